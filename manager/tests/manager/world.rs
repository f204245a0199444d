//! What the tests have in common: a manager in a folder of its own.

use std::net::SocketAddr;
use std::time::Duration;

use darter_identity::attend::Hello;
use darter_identity::{Identity, IdentityError, JoinToken};
use darter_manager::{Config, Handle};
use darter_types::{NodeName, Role};
use tempfile::TempDir;

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// No step of a test may take longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct World {
    pub(crate) config: Config,
    pub(crate) manager: Handle,
    pub(crate) folder: TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with_life(3600).await
    }

    pub(crate) async fn with_life(certificate_life_seconds: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let config = Config {
            root: folder.path().join("manager"),
            grpc_listen: any,
            http_listen: any,
            certificate_life_seconds,
            ..Config::default()
        };
        let manager = darter_manager::start(config.clone()).await.unwrap();
        Self { config, manager, folder }
    }

    /// The same manager again, on the same ports.
    pub(crate) async fn restart(self) -> Self {
        let Self { mut config, manager, folder } = self;
        config.grpc_listen = manager.grpc_address();
        config.http_listen = manager.http_address();
        manager.stop().await;
        let manager = darter_manager::start(config.clone()).await.unwrap();
        Self { config, manager, folder }
    }

    pub(crate) fn address(&self) -> String {
        self.manager.grpc_address().to_string()
    }

    pub(crate) fn token(&self, role: Role) -> JoinToken {
        self.manager.mint_token(role, HOUR, 1).unwrap()
    }

    pub(crate) async fn try_join(&self, token: &JoinToken, node: &str) -> Result<Identity, IdentityError> {
        let name: NodeName = node.parse().unwrap();
        let folder = self.folder.path().join(format!("{}-{node}", token.role));
        Identity::join(&self.address(), token, &name, &folder).await
    }

    pub(crate) async fn join(&self, role: Role, node: &str) -> Identity {
        self.try_join(&self.token(role), node).await.unwrap()
    }
}

pub(crate) fn hello(address: &str) -> Hello {
    Hello { version: "test".to_owned(), address: address.to_owned(), zone: "here".to_owned() }
}

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} did not happen"))
}
