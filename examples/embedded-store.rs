//! A Vault API server in memory, to try things on: `cargo run --example embedded-store`, and in another shell the two
//! `export` lines that it prints, then `vault kv put secret/app password=…`. Ctrl-C ends it.
//!
//! An argument is the address to listen on: `cargo run --example embedded-store -- 127.0.0.1:8200`.

// An example talks to people.
#![allow(clippy::print_stdout)]

use fuse_secrets::dev::{Embedded, Options};
use fuse_secrets::secret::Token;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut options = Options::default();
    if let Some(listen) = std::env::args().nth(1) {
        options.listen = listen.parse()?;
    }
    // Known to everybody, as nothing here is a secret. Leave it out, and a random one is made.
    options.root_token = Some(Token::new("root".into())?);
    let store = Embedded::start(options).await?;
    println!("{}\n", store.banner());
    println!("export VAULT_ADDR={}\nexport VAULT_TOKEN={}", store.address(), store.root_token().expose());
    tokio::signal::ctrl_c().await?;
    store.shutdown().await;
    Ok(())
}
