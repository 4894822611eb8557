//! Compiles `proto/` into Rust for the shim, without protoc. The agent builds this crate without the feature `shim`, and so
//! without any of it.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    #[cfg(feature = "shim")]
    {
        // What can carry a token must not be printed.
        const SILENT: [&str; 1] = [".csi.v1.NodePublishVolumeRequest"];

        let files = protox::compile(["csi.proto", "registration.proto"], ["proto"])?;
        tonic_prost_build::configure()
            .build_client(cfg!(feature = "client"))
            .btree_map(".")
            .skip_debug(SILENT)
            .compile_fds(files)?;
    }
    println!("cargo::rerun-if-changed=proto");
    Ok(())
}
