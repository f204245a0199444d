//! A registry with a token server before it (distribution specification, "Token authentication"): Debian's docker-registry
//! over the storage of a [`Registry`], so what was pushed there can be pulled here. The token server knows the same user.

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::json;

use crate::command::{Daemon, Run};
use crate::http::{Head, Server, answer};
use crate::registry::{PASSWORD, Registry, Request, USER, requests_in};
use crate::world::{Host, World};

const PORT: u16 = 5002;
const TOKEN_PORT: u16 = 5003;
/// Issuer and audience of tokens.
const SERVICE: &str = "darter-test";
/// What the token server says to who doesn't know the password.
pub const REFUSAL: &str = "incorrect username or password";

/// Both servers; they end when it is dropped.
pub struct TokenRegistry {
    host: Host,
    daemon: Daemon,
    minter: Arc<Minter>,
    _server: Server,
}

impl TokenRegistry {
    /// On the host of `registry`.
    pub fn start(world: &World, registry: &Registry) -> Result<Self> {
        let (host, folder) = (registry.host().clone(), world.folder("token-registry")?);
        let minter = Arc::new(Minter::new(&folder.join("key.pem"), &folder.join("cert.pem"))?);
        let served = minter.clone();
        let server = Server::start(&host, TOKEN_PORT, move |head, stream| {
            // Who breaks off gets no token.
            let _ = served.serve(&head, stream);
        })?;
        let config = folder.join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n\
             http: {{addr: \"0.0.0.0:{PORT}\", secret: test}}\nauth:\n  token: {{realm: \"http://{}/token\", \
             service: {SERVICE}, issuer: {SERVICE}, rootcertbundle: {}}}\n",
            registry.storage(world)?.display(),
            server.authority(),
            folder.join("cert.pem").display()
        );
        fs::write(&config, text)?;
        let run = host.run("docker-registry").arg("serve").arg(config.display());
        let mut daemon = Daemon::start("token-registry", run, &folder.join("log"))?;
        daemon.wait_ready(20, || crate::registry::answers(&host, PORT))?;
        Ok(Self { host, daemon, minter, _server: server })
    }

    pub fn authority(&self) -> String {
        format!("{}:{PORT}", self.host.address())
    }

    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}:latest", self.authority())
    }

    /// A token by which this repository can be pulled.
    pub fn mint(&self, name: &str) -> Result<String> {
        self.minter.mint(&format!("repository:{name}:pull"))
    }

    /// Every request so far that was answered to its end.
    pub fn requests(&self) -> Vec<Request> {
        requests_in(&self.daemon.log_text())
    }
}

/// Makes tokens, signed by openssl with a key that the registry believes.
struct Minter {
    key: PathBuf,
    /// The certificate of the key in DER, as the head of a token has it.
    certificate: String,
}

impl Minter {
    fn new(key: &std::path::Path, certificate: &std::path::Path) -> Result<Self> {
        let make = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tokens", "-days", "2"];
        let run = Run::new("openssl").args(make).arg("-keyout").arg(key.display());
        run.arg("-out").arg(certificate.display()).check()?;
        let pem = fs::read_to_string(certificate)?;
        let certificate = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        Ok(Self { key: key.to_owned(), certificate })
    }

    fn mint(&self, scope: &str) -> Result<String> {
        let part = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let head = json!({"typ": "JWT", "alg": "RS256", "x5c": [self.certificate]});
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let access: Vec<_> = scope.split(' ').filter_map(access).collect();
        let claims = json!({
            "iss": SERVICE, "aud": SERVICE, "sub": USER, "jti": format!("{now}"),
            "iat": now - 10, "nbf": now - 10, "exp": now + 3600, "access": access,
        });
        let text = format!("{}.{}", part(head), part(claims));
        let sign = format!("openssl dgst -sha256 -sign {} | openssl base64 -A", self.key.display());
        let signature = Run::new("sh").args(["-c", &sign]).input(text.clone()).check()?;
        let signature = STANDARD.decode(signature.trim()).context("openssl's signature")?;
        Ok(format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// Tokens are asked for with GET; who posts is told so, as by many registries.
    fn serve(&self, head: &Head, mut stream: TcpStream) -> Result<()> {
        let login = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
        if head.method != "GET" {
            return Ok(answer(&mut stream, 405, &[], "")?);
        }
        if head.header("authorization") != Some(&login) {
            let words = json!({"errors": [{"code": "UNAUTHORIZED", "message": REFUSAL}]});
            return Ok(answer(&mut stream, 401, &[], &words.to_string())?);
        }
        let scope = head.parameter("scope").unwrap_or_default();
        let scope = scope.replace("%3A", ":").replace("%2F", "/").replace("%2C", ",").replace('+', " ");
        let token = json!({"token": self.mint(&scope)?, "expires_in": 300});
        Ok(answer(&mut stream, 200, &[], &token.to_string())?)
    }
}

/// `repository:team/app:pull,push` as a token's claim has it.
fn access(scope: &str) -> Option<serde_json::Value> {
    let (kind, rest) = scope.split_once(':')?;
    let (name, acts) = rest.rsplit_once(':')?;
    Some(json!({"type": kind, "name": name, "actions": acts.split(',').collect::<Vec<_>>()}))
}
