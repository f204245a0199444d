//! A world: a scratch folder and a network of namespaces, all gone when it is dropped, also on a panic or a signal.
//!
//! Nothing is made in the machine's own network namespace: the bridge that joins the hosts has one to itself.
//! A process has one world at a time.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::thread;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

use crate::command::Run;
use crate::sweep;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Large enough for the rate to be smooth, and for packets not to wake the kernel one by one.
const BURST: &str = "256k";

/// A network, and a folder to write in.
pub struct World {
    scratch: PathBuf,
    switch: PathBuf,
    hosts: Mutex<u8>,
    _one: MutexGuard<'static, ()>,
}

impl World {
    pub fn new() -> Result<Self> {
        let one = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let owner = std::process::id();
        sweep::sweep_the_dead();
        sweep::sweep(owner);
        let scratch = sweep::scratch(owner);
        fs::create_dir_all(&scratch).with_context(|| format!("making {}", scratch.display()))?;
        let switch = add_namespace("switch")?;
        let world = Self { scratch, switch, hosts: Mutex::new(0), _one: one };
        ip_in(&world.switch, "link add br0 type bridge")?;
        ip_in(&world.switch, "link set br0 up")?;
        Ok(world)
    }

    /// A folder of its own for whatever this name stands for.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.scratch.join(name);
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// A host on the bridge: a network namespace with `lo` and `eth0`.
    pub fn host(&self, role: &str) -> Result<Host> {
        let mut hosts = self.hosts.lock().expect("no panic while counting");
        *hosts += 1;
        let (port, address) = (format!("p{hosts}"), Ipv4Addr::new(10, 77, 0, 10 + *hosts));
        let namespace = add_namespace(role)?;
        let peer = namespace.file_name().expect("a name was given").to_string_lossy().into_owned();
        ip_in(&self.switch, &format!("link add {port} type veth peer name eth0 netns {peer}"))?;
        ip_in(&self.switch, &format!("link set {port} master br0 up"))?;
        ip_in(&namespace, &format!("addr add {address}/24 dev eth0"))?;
        ip_in(&namespace, "link set eth0 up")?;
        pin_congestion_control(&namespace)?;
        Ok(Host { role: role.into(), namespace, address, switch: self.switch.clone(), port })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        sweep::save_logs(std::process::id());
        sweep::sweep(std::process::id());
    }
}

fn add_namespace(role: &str) -> Result<PathBuf> {
    let name = sweep::namespace_name(std::process::id(), role);
    Run::new("ip").args(["netns", "add", &name]).check()?;
    let path = Path::new("/run/netns").join(name);
    ip_in(&path, "link set lo up")?;
    Ok(path)
}

fn ip_in(namespace: &Path, words: &str) -> Result<()> {
    Run::in_namespace(namespace, "ip").args(words.split(' ')).check().map(drop)
}

/// Pinned, so that a machine's default does not decide what a measurement says: cubic, or reno where the machine
/// does not allow cubic in other namespaces than its own.
fn pin_congestion_control(namespace: &Path) -> Result<()> {
    let set = |name: &str| {
        let setting = format!("net.ipv4.tcp_congestion_control={name}");
        Run::in_namespace(namespace, "sysctl").args(["-qw", &setting]).check().map(drop)
    };
    set("cubic").or_else(|_| set("reno"))
}

/// Bytes and packets at a host's link, as the host sees them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    pub received: u64,
    pub sent: u64,
}

impl std::ops::Sub for Traffic {
    type Output = Self;
    fn sub(self, before: Self) -> Self {
        Self { received: self.received - before.received, sent: self.sent - before.sent }
    }
}

/// A network namespace with an address on the world's bridge.
#[derive(Clone, Debug)]
pub struct Host {
    role: String,
    namespace: PathBuf,
    address: Ipv4Addr,
    switch: PathBuf,
    port: String,
}

impl Host {
    pub fn role(&self) -> &str {
        &self.role
    }

    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A command on this host.
    pub fn run(&self, program: impl AsRef<Path>) -> Run {
        Run::in_namespace(&self.namespace, program)
    }

    /// Limits both directions of the link.
    pub fn limit(&self, mbit: u32) -> Result<()> {
        let shape = |namespace: &Path, device: &str| {
            let words =
                format!("qdisc replace dev {device} root tbf rate {mbit}mbit burst {BURST} latency 100ms");
            Run::in_namespace(namespace, "tc").args(words.split(' ')).check().map(drop)
        };
        shape(&self.namespace, "eth0")?;
        shape(&self.switch, &self.port)
    }

    pub fn unlimit(&self) -> Result<()> {
        let clear = |namespace: &Path, device: &str| {
            Run::in_namespace(namespace, "tc")
                .args(["qdisc", "del", "dev", device, "root"])
                .output()
                .map(drop)
        };
        clear(&self.namespace, "eth0")?;
        clear(&self.switch, &self.port)
    }

    /// Cuts the host off, or joins it again.
    pub fn connected(&self, yes: bool) -> Result<()> {
        ip_in(&self.switch, &format!("link set {} {}", self.port, if yes { "up" } else { "down" }))
    }

    /// Runs `work` on a thread of its own inside this namespace: a socket that it opens stays there.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let entered = scope.spawn(|| {
                setns(File::open(&self.namespace)?, CloneFlags::CLONE_NEWNET)?;
                work()
            });
            entered.join().expect("the work does not panic")
        })
    }

    /// From now on counts what comes from `source`; see [`Host::received_from`].
    pub fn count_from(&self, source: Ipv4Addr) -> Result<()> {
        self.run("iptables").args(["-w", "-A", "INPUT", "-s", &source.to_string()]).check().map(drop)
    }

    /// Bytes of packets from `source` since [`Host::count_from`].
    pub fn received_from(&self, source: Ipv4Addr) -> Result<u64> {
        let table = self.run("iptables").args(["-w", "-nvxL", "INPUT"]).check()?;
        counted(&table, source).with_context(|| format!("{source} is not counted on {}", self.role))
    }

    pub fn traffic(&self) -> Result<Traffic> {
        let table = self.inside(|| Ok(fs::read_to_string("/proc/thread-self/net/dev")?))?;
        traffic_of("eth0", &table).context("no counters of eth0")
    }
}

/// In `PACKETS BYTES all -- * * SOURCE DESTINATION`.
fn counted(table: &str, source: Ipv4Addr) -> Option<u64> {
    let fields = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let line = table.lines().map(fields).find(|fields| fields.contains(&source.to_string()))?;
    line.get(1)?.parse().ok()
}

fn traffic_of(device: &str, table: &str) -> Option<Traffic> {
    let line = table.lines().find_map(|line| line.trim().strip_prefix(&format!("{device}:")))?;
    let fields: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    Some(Traffic { received: *fields.first()?, sent: *fields.get(8)? })
}

/// From now on SIGINT, SIGTERM and SIGHUP sweep this process's world away before they end it.
///
/// By handlers: a blocked signal would stay blocked in every program that is started from here.
pub fn sweep_on_signal() {
    thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let signal = runtime.expect("a runtime with one thread can be made").block_on(first_signal());
        eprintln!("\n{}: cleaning up", signal.as_str());
        sweep::sweep(std::process::id());
        std::process::exit(128 + signal as i32);
    });
}

async fn first_signal() -> Signal {
    let handler = |kind| signal(kind).expect("a handler can be set");
    let mut interrupt = handler(SignalKind::interrupt());
    let mut terminate = handler(SignalKind::terminate());
    let mut hangup = handler(SignalKind::hangup());
    tokio::select! {
        _ = interrupt.recv() => Signal::SIGINT,
        _ = terminate.recv() => Signal::SIGTERM,
        _ = hangup.recv() => Signal::SIGHUP,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_of_iptables_counts_one_source() {
        let table = "Chain INPUT\n pkts bytes target prot opt in out source destination\n\
                     7 1234  0 -- * * 10.77.0.11 0.0.0.0/0\n";
        assert_eq!(counted(table, Ipv4Addr::new(10, 77, 0, 11)), Some(1234));
        assert_eq!(counted(table, Ipv4Addr::new(10, 77, 0, 12)), None);
    }

    #[test]
    fn counters_are_read_from_the_kernels_table() {
        let table = "Inter-| Receive\n face |bytes\n  eth0: 10 1 0 0 0 0 0 0 20 2 0 0 0 0 0 0\n";
        let traffic = traffic_of("eth0", table).expect("a line");
        assert_eq!((traffic.received, traffic.sent), (10, 20));
    }
}
