//! The names of a volume: one node per file and directory, numbered in the order of the spec.

use crate::reference::FilePath;

/// A file or directory.
#[derive(Debug)]
pub struct Node {
    /// Its own name; empty for the root.
    pub name: String,
    /// What it is.
    pub kind: NodeKind,
    index: u32,
}

impl Node {
    /// Its number in the tree.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }
}

/// What a node is.
#[derive(Debug)]
pub enum NodeKind {
    /// A directory with its children, sorted by name.
    Directory {
        /// The directory above; the root's is itself.
        parent: u32,
        /// Nodes below.
        children: Vec<u32>,
    },
    /// A file.
    File {
        /// Its index in the spec.
        index: usize,
    },
}

/// All nodes; the root is number 0.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    /// Node of each file, by its index in the spec.
    files: Vec<u32>,
}

impl Tree {
    /// The root's number.
    pub const ROOT: u32 = 0;
    /// Name of the link to the newest generation.
    pub const DATA: &str = "..data";

    /// The tree of these paths. No path may be given twice or be another's directory: the class parser refuses both.
    pub fn new<'a>(paths: impl Iterator<Item = &'a FilePath>) -> Self {
        let root = NodeKind::Directory { parent: Self::ROOT, children: Vec::new() };
        let mut tree = Self {
            nodes: vec![Node { name: String::new(), kind: root, index: Self::ROOT }],
            files: Vec::new(),
        };
        for (index, path) in paths.enumerate() {
            let mut at = Self::ROOT;
            let mut parts = path.parts().peekable();
            while let Some(part) = parts.next() {
                at = match tree.child(tree.node(at), part) {
                    Some(child) => child,
                    None if parts.peek().is_some() => {
                        tree.add(at, part, NodeKind::Directory { parent: at, children: Vec::new() })
                    }
                    None => tree.add(at, part, NodeKind::File { index }),
                };
            }
            tree.files.push(at);
        }
        tree
    }

    /// Number of nodes, the root among them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Never: there is always a root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// A node by its number, which is one of this tree's.
    #[must_use]
    pub fn node(&self, index: u32) -> &Node {
        &self.nodes[index as usize]
    }

    /// A node by a number that somebody else gave.
    #[must_use]
    pub fn try_node(&self, index: u32) -> Option<&Node> {
        self.nodes.get(index as usize)
    }

    /// The node of a file of the spec.
    #[must_use]
    pub fn file(&self, index: usize) -> u32 {
        self.files[index]
    }

    /// The child of a directory with this name.
    #[must_use]
    pub fn child(&self, node: &Node, name: &str) -> Option<u32> {
        let NodeKind::Directory { children, .. } = &node.kind else { return None };
        self.position(children, name).ok().map(|at| children[at])
    }

    /// Number of directories directly in this one.
    #[must_use]
    pub fn subdirectories(&self, node: &Node) -> u32 {
        let NodeKind::Directory { children, .. } = &node.kind else { return 0 };
        let directories =
            children.iter().filter(|&&child| matches!(self.node(child).kind, NodeKind::Directory { .. }));
        u32::try_from(directories.count()).unwrap_or(u32::MAX)
    }

    fn position(&self, children: &[u32], name: &str) -> Result<usize, usize> {
        children.binary_search_by(|&child| self.node(child).name.as_str().cmp(name))
    }

    fn add(&mut self, parent: u32, name: &str, kind: NodeKind) -> u32 {
        let index = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        self.nodes.push(Node { name: name.to_owned(), kind, index });
        let NodeKind::Directory { children, .. } = &self.nodes[parent as usize].kind else { return index };
        let Err(at) = self.position(children, name) else { return index };
        if let NodeKind::Directory { children, .. } = &mut self.nodes[parent as usize].kind {
            children.insert(at, index);
        }
        index
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(paths: &[&str]) -> Tree {
        let paths: Vec<FilePath> = paths.iter().map(|path| FilePath::parse(path).unwrap()).collect();
        Tree::new(paths.iter())
    }

    #[test]
    fn directories_are_made_once_and_children_stand_sorted() {
        let tree = tree(&["tls/key", "password", "tls/crt", "tls/deep/ca"]);
        let root = tree.node(Tree::ROOT);
        let tls = tree.child(root, "tls").unwrap();
        assert_eq!(tree.child(root, "crt"), None);
        assert_eq!((tree.subdirectories(root), tree.subdirectories(tree.node(tls))), (1, 1));
        let NodeKind::Directory { children, parent } = &tree.node(tls).kind else {
            panic!("not a directory")
        };
        let names: Vec<&str> = children.iter().map(|&child| tree.node(child).name.as_str()).collect();
        assert_eq!((names, *parent), (vec!["crt", "deep", "key"], Tree::ROOT));
    }

    #[test]
    fn a_files_node_depends_on_the_order_of_the_spec_alone() {
        let tree = tree(&["b", "a", "c/d"]);
        assert_eq!([0, 1, 2].map(|index| tree.file(index)), [1, 2, 4]);
        assert!(matches!(tree.node(4).kind, NodeKind::File { index: 2 }));
    }
}
