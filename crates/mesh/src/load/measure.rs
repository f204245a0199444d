//! The kernel's counters for the store's disk and the host's link, and what two readings of them say.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::stat::{major, minor};

const PRESSURE: &str = "/proc/pressure/io";
const DISKS: &str = "/proc/diskstats";
const TRAFFIC: &str = "/proc/net/dev";
const ROUTES: &str = "/proc/net/route";
const ADDRESSES: &str = "/proc/net/if_inet6";

/// What is looked at on this host.
#[derive(Debug)]
pub(super) struct Host {
    /// Major and minor number of the device that the store's file system names. Some name one that is no disk.
    disk: (u64, u64),
    /// `None`: no route leads to it.
    link: Option<Link>,
}

#[derive(Debug)]
struct Link {
    device: String,
    /// Bytes per second in one direction.
    rate: u64,
}

/// Counters at one moment. `None`: the kernel doesn't tell, or it isn't known of what.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counters {
    /// Microseconds in which some task of the host waited for any disk.
    waited_us: Option<u64>,
    /// Milliseconds in which the store's disk had something to do.
    busy_ms: Option<u64>,
    traffic: Option<Traffic>,
    /// Bytes that came in the background, of those that were received.
    background: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Traffic {
    received: u64,
    sent: u64,
}

/// How much of what they can do is taken, from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Shares {
    pub disk: Option<f64>,
    pub network: Option<f64>,
}

impl Host {
    /// `address` is `host:port`; `rate` is what the link takes, if the kernel is not to be believed.
    pub(super) fn find(store: &Path, address: &str, rate: Option<u64>) -> Self {
        let device = fs::metadata(store).map_or(0, |found| found.dev());
        let host = Self { disk: (major(device), minor(device)), link: Link::find(address, rate) };
        tracing::debug!(?host, "the background looks at these");
        host
    }

    pub(super) fn link_rate(&self) -> Option<u64> {
        self.link.as_ref().map(|link| link.rate)
    }

    pub(super) fn counters(&self, background: u64) -> Counters {
        let read = |path: &str| fs::read_to_string(path).ok();
        Counters {
            waited_us: read(PRESSURE).as_deref().and_then(waited_us),
            busy_ms: read(DISKS).as_deref().and_then(|text| busy_ms(text, self.disk)),
            traffic: self.link.as_ref().and_then(|link| traffic(&read(TRAFFIC)?, &link.device)),
            background,
        }
    }
}

impl Link {
    fn find(address: &str, rate: Option<u64>) -> Option<Self> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let ip = host.trim_matches(['[', ']']).parse::<IpAddr>().ok();
        let routed = |ip| fs::read_to_string(ROUTES).ok().and_then(|text| routed(&text, ip));
        let device = match ip {
            Some(IpAddr::V4(ip)) => routed(Some(ip)),
            Some(IpAddr::V6(ip)) => fs::read_to_string(ADDRESSES)
                .ok()
                .and_then(|text| device_with(&text, &format!("{:032x}", ip.to_bits()))),
            None => None,
        };
        let device = device.or_else(|| routed(None))?;
        let rate = rate.or_else(|| speed(&device))?;
        Some(Self { device, rate })
    }
}

/// Bytes per second, if the kernel knows: virtual cards often say -1.
fn speed(device: &str) -> Option<u64> {
    let mbit = fs::read_to_string(format!("/sys/class/net/{device}/speed")).ok()?;
    let mbit: u64 = mbit.trim().parse().ok()?;
    (mbit > 0).then_some(mbit * 125_000)
}

/// What happened in `time` between two readings.
pub(super) fn shares(before: &Counters, now: &Counters, time: Duration, link_rate: Option<u64>) -> Shares {
    let seconds = time.as_secs_f64();
    let since = |before: Option<u64>, now: Option<u64>| Some(now?.saturating_sub(before?) as f64);
    let waited = since(before.waited_us, now.waited_us).map(|us| us / 1e6 / seconds);
    let busy = since(before.busy_ms, now.busy_ms).map(|ms| ms / 1e3 / seconds);
    // Somebody may wait for another disk, and a disk that works may have room for much more.
    let disk = match (waited, busy) {
        (Some(waited), Some(busy)) => Some(waited.min(busy)),
        (waited, busy) => waited.or(busy),
    };
    let network = link_rate.and_then(|rate| Some(others(before, now)? as f64 / seconds / rate as f64));
    Shares { disk, network }
}

/// Bytes in the busier direction that were not ours of the background.
fn others(before: &Counters, now: &Counters) -> Option<u64> {
    let (then, traffic) = (before.traffic?, now.traffic?);
    let background = now.background.saturating_sub(before.background);
    let received = traffic.received.saturating_sub(then.received).saturating_sub(background);
    Some(received.max(traffic.sent.saturating_sub(then.sent)))
}

/// Of `some avg10=0.00 avg60=0.00 avg300=0.00 total=MICROSECONDS`.
fn waited_us(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with("some "))?;
    line.rsplit_once("total=")?.1.trim().parse().ok()
}

/// The tenth of the numbers behind the device's name.
fn busy_ms(text: &str, (major, minor): (u64, u64)) -> Option<u64> {
    let fields = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let is_it = |fields: &Vec<&str>| {
        fields.first().and_then(|field| field.parse().ok()) == Some(major)
            && fields.get(1).and_then(|field| field.parse().ok()) == Some(minor)
    };
    fields.into_iter().find(is_it)?.get(12)?.parse().ok()
}

fn traffic(text: &str, device: &str) -> Option<Traffic> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'))?;
    let field = |at: usize| line.split_whitespace().nth(at)?.parse().ok();
    Some(Traffic { received: field(0)?, sent: field(8)? })
}

/// The device of the narrowest route that `ip` belongs to; without one, of the default route. Numbers are as the kernel has
/// them in memory, in hexadecimal.
fn routed(text: &str, ip: Option<Ipv4Addr>) -> Option<String> {
    let number = |field: &str| u32::from_str_radix(field, 16).ok().map(u32::from_be);
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (net, mask) = (number(fields.get(1)?)?, number(fields.get(7)?)?);
        let fits = ip.map_or(mask == 0, |ip| ip.to_bits() & mask == net);
        fits.then(|| (mask, fields[0].to_owned()))
    };
    text.lines().skip(1).filter_map(route).max_by_key(|(mask, _)| *mask).map(|(_, device)| device)
}

/// The device that has this address, which is written as the table does.
fn device_with(text: &str, address: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(address))?;
    Some(line.split_whitespace().last()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let pressure = "some avg10=4.44 avg60=3.22 avg300=2.90 total=1762619360\nfull avg10=3.25 total=7\n";
        assert_eq!(waited_us(pressure), Some(1_762_619_360));
        let disks = "   7       0 loop0 0 0 0 0 0 0 0 0 0 0 0\n \
            254       0 vda 20581354 1905034 1266241714 35549763 5964958 8314441 1324528848 9978358 0 2209152 464\n";
        assert_eq!(busy_ms(disks, (254, 0)), Some(2_209_152));
        assert_eq!(busy_ms(disks, (0, 44)), None);
        let table = "Inter-| Receive\n face |bytes\n  eth0: 10 1 0 0 0 0 0 0 20 2 0 0 0 0 0 0\n eth01: 9\n";
        assert_eq!(traffic(table, "eth0"), Some(Traffic { received: 10, sent: 20 }));
        assert_eq!(traffic(table, "eth1"), None);
    }

    #[test]
    fn the_link_is_that_of_the_narrowest_route() {
        let table = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n\
            eth0 00000000 0100000A 0003 0 0 0 00000000 0 0 0\n\
            eth1 00004D0A 00000000 0001 0 0 0 00FFFFFF 0 0 0\n";
        let of = |ip: Option<[u8; 4]>| routed(table, ip.map(Ipv4Addr::from));
        assert_eq!(of(Some([10, 77, 0, 12])).as_deref(), Some("eth1"));
        assert_eq!(of(Some([10, 78, 0, 12])).as_deref(), Some("eth0"));
        assert_eq!(of(None).as_deref(), Some("eth0"));
        let table = "fe80000000000000b4e5f0fffe9a1b2c 02 40 20 80     eth7\n";
        assert_eq!(device_with(table, "fe80000000000000b4e5f0fffe9a1b2c").as_deref(), Some("eth7"));
    }

    fn counters(waited_ms: u64, busy_ms: u64, received: u64, sent: u64, background: u64) -> Counters {
        Counters {
            waited_us: Some(waited_ms * 1000),
            busy_ms: Some(busy_ms),
            traffic: Some(Traffic { received, sent }),
            background,
        }
    }

    #[test]
    fn the_disk_is_as_busy_as_those_who_wait_for_it_and_itself() {
        let (before, time) = (counters(0, 0, 0, 0, 0), Duration::from_secs(2));
        let disk = |waited, busy| shares(&before, &counters(waited, busy, 0, 0, 0), time, None).disk;
        assert_eq!(disk(1000, 2000), Some(0.5));
        assert_eq!(disk(1000, 100), Some(0.05));
        let untold = Counters { busy_ms: None, ..counters(1000, 0, 0, 0, 0) };
        assert_eq!(shares(&before, &untold, time, None).disk, Some(0.5));
    }

    #[test]
    fn the_background_is_no_load_to_itself() {
        let (before, time) = (counters(0, 0, 0, 0, 0), Duration::from_secs(1));
        let network = |received, sent, background| {
            shares(&before, &counters(0, 0, received, sent, background), time, Some(1000)).network
        };
        assert_eq!(network(900, 100, 800), Some(0.1));
        assert_eq!(network(900, 950, 800), Some(0.95));
        assert_eq!(network(100, 0, 800), Some(0.0));
        assert_eq!(shares(&before, &before, time, None).network, None);
    }
}
