//! How many strangers stand at a door at a time, and from where: whoever reaches a port could otherwise hold all its places
//! by saying nothing.
//!
//! A source, that is an IPv4 address or an IPv6 network of 64 bits, has a share of the places. Where there is none, the
//! guest that has said nothing for longest has to go; if all have spoken, the new one is turned away.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

pub(crate) struct Door {
    places: usize,
    share: usize,
    guests: Mutex<Guests>,
}

#[derive(Default)]
struct Guests {
    next: u64,
    /// In the order in which they came.
    here: BTreeMap<u64, Guest>,
}

struct Guest {
    source: IpAddr,
    is_silent: bool,
    leave: CancellationToken,
}

/// A place at a door, until it is dropped.
pub(crate) struct Place {
    door: Arc<Door>,
    id: u64,
    /// Cancelled when another guest gets the place.
    pub(crate) leave: CancellationToken,
}

impl Door {
    /// `share` of the `places` for one source.
    pub(crate) fn new(places: usize, share: usize) -> Arc<Self> {
        Arc::new(Self { places, share, guests: Mutex::default() })
    }

    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let source = network(address);
        let mut guests = self.guests.lock();
        if guests.count(|guest| guest.source == source) >= self.share {
            guests.send_away(|guest| guest.source == source)?;
        } else if guests.here.len() >= self.places {
            guests.send_away(|_| true)?;
        }
        let (id, leave) = (guests.next, CancellationToken::new());
        guests.next += 1;
        guests.here.insert(id, Guest { source, is_silent: true, leave: leave.clone() });
        Some(Place { door: self.clone(), id, leave })
    }
}

impl Guests {
    fn count(&self, which: impl Fn(&Guest) -> bool) -> usize {
        self.here.values().filter(|guest| which(guest)).count()
    }

    fn send_away(&mut self, which: impl Fn(&Guest) -> bool) -> Option<()> {
        let (id, _) = self.here.iter().find(|(_, guest)| guest.is_silent && which(guest))?;
        let id = *id;
        self.here.remove(&id)?.leave.cancel();
        Some(())
    }
}

impl Place {
    /// Who has said something keeps the place.
    pub(crate) fn spoke(&self) {
        if let Some(guest) = self.door.guests.lock().here.get_mut(&self.id) {
            guest.is_silent = false;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.door.guests.lock().here.remove(&self.id);
    }
}

/// Whoever has one IPv6 address as a rule has all of its last 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(door: &Arc<Door>, address: &str) -> Option<Place> {
        door.enter(address.parse().unwrap())
    }

    #[test]
    fn source_that_has_its_share_leaves_room_to_others() {
        let door = Door::new(10, 2);
        let places = ["192.0.2.1", "::ffff:192.0.2.1"].map(|address| enter(&door, address).unwrap());
        places.iter().for_each(Place::spoke);
        assert!(enter(&door, "192.0.2.1").is_none());
        assert!(enter(&door, "192.0.2.2").is_some());
        drop(places);
        assert!(enter(&door, "192.0.2.1").is_some());
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_source() {
        let door = Door::new(10, 1);
        let place = enter(&door, "2001:db8::1").unwrap();
        place.spoke();
        assert!(enter(&door, "2001:db8::ffff:1").is_none());
        assert!(enter(&door, "2001:db8:0:1::1").is_some());
    }

    #[test]
    fn who_has_said_nothing_for_longest_gives_way() {
        let door = Door::new(3, 3);
        let [spoke, oldest, newest] =
            ["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(|address| enter(&door, address).unwrap());
        spoke.spoke();
        let _next = enter(&door, "192.0.2.4").unwrap();
        let left = [&spoke, &oldest, &newest].map(|place| place.leave.is_cancelled());
        assert_eq!(left, [false, true, false]);
        drop(oldest);
        assert_eq!(door.guests.lock().here.len(), 3);
    }

    #[test]
    fn silent_guests_of_a_source_that_has_its_share_give_way_before_those_of_others() {
        let door = Door::new(10, 1);
        let other = enter(&door, "192.0.2.1").unwrap();
        let first = enter(&door, "192.0.2.2").unwrap();
        assert!(enter(&door, "192.0.2.2").is_some());
        assert!(first.leave.is_cancelled() && !other.leave.is_cancelled());
    }
}
