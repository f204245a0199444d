//! Of holders that answer, are late, refuse, or are not there.

use super::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

#[test]
fn a_connection_that_ended_is_told_from_one_that_lives() {
    let (one, other) = UnixStream::pair().unwrap();
    assert!(!ended(one.as_fd()));
    drop(other);
    assert!(ended(one.as_fd()));
}

#[test]
fn a_descriptor_comes_with_its_packet() {
    let dir = tempfile::tempdir().unwrap();
    let listener = packet::listen_at(&dir.path().join("s")).unwrap();
    let client = packet::connect_to(&dir.path().join("s")).unwrap();
    let (server, user) = packet::accept(listener.as_fd()).unwrap();
    assert_eq!(user, nix::unistd::geteuid().as_raw());
    let (mut near, far) = UnixStream::pair().unwrap();
    packet::send(client.as_fd(), b"Kname", Some(far.as_fd()), None).unwrap();
    let packet = packet::receive(server.as_fd()).unwrap().unwrap();
    assert_eq!(protocol::parse(&packet.bytes).unwrap(), (protocol::KEEP, "name"));
    UnixStream::from(packet.descriptor.unwrap()).write_all(b"hello").unwrap();
    let mut heard = [0; 5];
    near.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello");
    drop(client);
    assert!(packet::receive(server.as_fd()).unwrap().is_none());
}

fn shared_below(root: &Path, launch: Launch) -> Shared {
    Shared {
        socket: socket_below(root),
        launch,
        service_manager: None,
        kept: Mutex::default(),
        holder: Mutex::default(),
        has_holder: AtomicBool::new(false),
        over: AtomicBool::new(false),
    }
}

#[test]
fn a_holder_that_does_not_take_what_it_is_given_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (near, _far) = UnixStream::pair().unwrap();
    // It is told to sleep, so it never answers.
    let shared = shared_below(dir.path(), Launch { program: "sleep".into(), word: "1000" });
    shared.kept.lock().insert("name".to_owned(), near.into());
    let (child, line) = shared.holder().unwrap();
    let process = PathBuf::from(format!("/proc/{}", child.as_ref().unwrap().id()));
    assert!(process.exists());
    assert!(shared.equip((child, line)).is_err());
    assert!(!process.exists(), "it is there still, or its remains are");
}

/// No other holder can be started.
fn launch_of_nothing(root: &Path) -> Launch {
    Launch { program: root.join("none"), word: "hold" }
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_was_found_and_not_taken_over_is_given_to_the_next_holder() {
    let dir = tempfile::tempdir().unwrap();
    let (near, _far) = UnixStream::pair().unwrap();
    let first = testing::hold_below(dir.path(), &[("m", near.into())]);
    let (keeper, found) = Keeper::open(dir.path(), launch_of_nothing(dir.path())).unwrap();
    assert!(found.contains_key("m"));
    // Whoever looks after the holder waits until there is the next one.
    let one = keeper.0.holder.lock();
    end_holder_below(dir.path());
    first.join().unwrap().unwrap();
    let second = testing::hold_below(dir.path(), &[]);
    drop(one);
    eventually("the next holder has it", || testing::kept_below(dir.path()).contains_key("m"));
    keeper.end();
    second.join().unwrap().unwrap();
}

#[test]
fn what_was_found_is_open_nowhere_once_it_is_kept_anew_or_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let [(one, far_of_one), (other, far_of_other)] = [(); 2].map(|()| UnixStream::pair().unwrap());
    let holder = testing::hold_below(dir.path(), &[("one", one.into()), ("other", other.into())]);
    let (keeper, found) = Keeper::open(dir.path(), launch_of_nothing(dir.path())).unwrap();
    drop(found);
    assert!(!ended(far_of_one.as_fd()) && !ended(far_of_other.as_fd()));
    let (new, _far) = UnixStream::pair().unwrap();
    keeper.remember("one", new.as_fd());
    assert!(keeper.keep(&["one".to_owned()], &|| true));
    eventually("what was kept anew is closed", || ended(far_of_one.as_fd()));
    keeper.forget("other");
    eventually("what was forgotten is closed", || ended(far_of_other.as_fd()));
    keeper.end();
    holder.join().unwrap().unwrap();
}

/// Waits for whoever asks next, and for what it says.
fn hear(listener: &OwnedFd) -> OwnedFd {
    let (client, _) = packet::accept(listener.as_fd()).unwrap();
    let packet = packet::receive(client.as_fd()).unwrap().unwrap();
    assert_eq!(protocol::parse(&packet.bytes).unwrap(), (protocol::TAKE, ""));
    client
}

#[test]
fn a_holder_that_is_slow_or_falls_silent_within_its_answer_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let listener = packet::listen_at(&socket_below(dir.path())).unwrap();
    let (near, _far) = UnixStream::pair().unwrap();
    let here = protocol::compose(protocol::HERE, "m");
    let done = protocol::compose(protocol::DONE, "");
    let slow = std::thread::spawn(move || {
        let begins = |client: &OwnedFd| packet::send(client.as_fd(), &here, Some(near.as_fd()), None);
        let ends = |client: &OwnedFd| packet::send(client.as_fd(), &done, None, None);
        let hung_up = |client: OwnedFd| matches!(packet::receive(client.as_fd()), Ok(None) | Err(_));
        assert!(hung_up(hear(&listener)));
        let half = hear(&listener);
        // On a busy machine it has hung up already.
        let _ = begins(&half);
        assert!(hung_up(half));
        let answer = |client: OwnedFd| begins(&client).and_then(|()| ends(&client));
        while answer(hear(&listener)).is_err() {}
    });
    let left = shared_below(dir.path(), launch_of_nothing(dir.path())).left(&patience()).unwrap();
    assert!(left.contains_key("m"));
    slow.join().unwrap();
}

#[test]
fn a_holder_that_never_answers_is_no_reason_to_begin_anew() {
    let dir = tempfile::tempdir().unwrap();
    let _never_served = packet::listen_at(&socket_below(dir.path())).unwrap();
    let words = Keeper::open(dir.path(), launch_of_nothing(dir.path())).err().unwrap().to_string();
    assert!(words.contains("doesn't give back the mounts") && words.contains("holder.sock"), "{words}");
    assert!(socket_below(dir.path()).exists(), "nobody could find the holder any more");
}

#[test]
fn a_late_holder_is_waited_for_once_for_all_that_is_to_be_kept_and_not_at_all_once_nobody_wants_it() {
    let dir = tempfile::tempdir().unwrap();
    let shared = shared_below(dir.path(), launch_of_nothing(dir.path()));
    let _never_served = packet::listen_at(&shared.socket).unwrap();
    shared.has_holder.store(true, Ordering::Release);
    let keeper = Keeper(Arc::new(shared));
    let names = ["a", "a.notes", "b", "b.notes"].map(str::to_owned);
    let (near, _far) = UnixStream::pair().unwrap();
    names.iter().for_each(|name| keeper.remember(name, near.as_fd()));
    let began = Instant::now();
    assert!(!keeper.keep(&names, &|| false));
    assert!(began.elapsed() < PATIENCE);
    let began = Instant::now();
    assert!(!keeper.keep(&names, &|| true));
    assert!((PATIENCE..PATIENCE * 2).contains(&began.elapsed()), "{:?}", began.elapsed());
}

#[test]
fn where_no_holder_is_nothing_was_left() {
    let dir = tempfile::tempdir().unwrap();
    let shared = shared_below(dir.path(), launch_of_nothing(dir.path()));
    assert!(shared.left(&patience()).unwrap().is_empty(), "there is no socket");
    drop(packet::listen_at(&shared.socket).unwrap());
    assert!(shared.socket.exists());
    assert!(shared.left(&patience()).unwrap().is_empty(), "nobody listens at it any more");
}

#[test]
fn a_holder_that_refuses_or_says_something_strange_is_asked_once_and_gives_nothing() {
    let unknown_verb = b"\x01".as_slice();
    for answer in [protocol::compose(protocol::REFUSED, "").as_slice(), unknown_verb, b"H\xff"] {
        let dir = tempfile::tempdir().unwrap();
        let listener = packet::listen_at(&socket_below(dir.path())).unwrap();
        let shared = shared_below(dir.path(), launch_of_nothing(dir.path()));
        let listener = std::thread::scope(|scope| {
            let answering = scope.spawn(move || {
                packet::send(hear(&listener).as_fd(), answer, None, None).unwrap();
                listener
            });
            assert!(shared.left(&patience()).unwrap().is_empty());
            answering.join().unwrap()
        });
        let mut asked_again = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut asked_again, PollTimeout::ZERO), Ok(0), "{answer:?}");
    }
}

#[test]
fn where_no_holder_can_be_reached_at_its_socket_another_one_is_started() {
    let dir = tempfile::tempdir().unwrap();
    let shared = shared_below(dir.path(), Launch { program: "sleep".into(), word: "1000" });
    // Sockets of two types can't be connected.
    let _of_another_type = std::os::unix::net::UnixListener::bind(&shared.socket).unwrap();
    assert!(shared.left(&patience()).unwrap().is_empty());
    let mut child = shared.holder().unwrap().0.expect("it is a new one");
    assert!(packet::connect_to(&shared.socket).is_ok());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_late_holder_stops_nobody_who_needs_none_and_has_the_mounts_from_systemd() {
    let dir = tempfile::tempdir().unwrap();
    let shared = shared_below(dir.path(), launch_of_nothing(dir.path()));
    let _never_served = packet::listen_at(&shared.socket).unwrap();
    let (near, _far) = UnixStream::pair().unwrap();
    let began = Instant::now();
    let found = shared.found([("m".to_owned(), near.into())].into(), false).unwrap();
    assert!(found.contains_key("m"));
    assert!(began.elapsed() < PATIENCE, "it is asked once");
    let words = shared.found(Kept::new(), false).unwrap_err().to_string();
    assert!(words.contains("doesn't give back the mounts"), "it has what systemd has not passed: {words}");
}

#[test]
fn strange_packets_are_refused() {
    assert!(protocol::parse(b"").is_err());
    assert!(protocol::parse(b"K\xff").is_err());
}
