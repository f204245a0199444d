//! Takes away what a run has made: processes, FUSE connections, mounts, network namespaces, cgroups, files.
//!
//! Everything that a run makes carries the run's process id in its name, so that a sweep needs no record of it: it works
//! after a panic, from a signal, and for a run that was killed. Nothing here reads what would wait for a process's
//! memory map (command lines, `ps`): a process that hangs in a FUSE mount would hang the sweep.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const NAMESPACES: &str = "/run/netns";
const RUNC_STATE: &str = "/run/containerd/runc";
/// Below the folder of each containerd: runc's state of its pods, `NAMESPACE/ID`.
pub const POD_STATE: &str = "runc";
/// Where CNI notes the networks of each pod, in a file with its id in the name.
const CNI_RESULTS: &str = "/var/lib/cni/results";
const SCRATCH: &str = "/var/tmp/darter";
const CGROUPS: &str = "/sys/fs/cgroup";
/// A controller, where this process itself is put, and a namespace of containerd.
const CGROUPS_DEPTH_MAX: usize = 6;
/// Logs lie near the top; below are file systems that may hang.
const LOGS_DEPTH_MAX: usize = 2;

/// The folder for everything that run `owner` writes.
pub fn scratch(owner: u32) -> PathBuf {
    Path::new(SCRATCH).join(owner.to_string())
}

/// The name of a network namespace of run `owner`.
pub fn namespace_name(owner: u32, role: &str) -> String {
    format!("darter-{owner}-{role}")
}

/// The namespace of containerd that run `owner` uses, which is also the name of its cgroups.
pub fn containerd_namespace(owner: u32) -> String {
    format!("darter-{owner}")
}

/// Sweeps after every run whose process is gone.
pub fn sweep_the_dead() {
    let mut owners = BTreeSet::new();
    owners.extend(names(SCRATCH).iter().filter_map(|name| name.parse::<u32>().ok()));
    owners.extend(names(NAMESPACES).iter().filter_map(|name| owner_of_namespace(name)));
    for owner in owners {
        if !Path::new(&format!("/proc/{owner}")).exists() {
            sweep(owner);
        }
    }
}

/// Takes away everything of run `owner`, and says what was still there of processes and mounts.
pub fn sweep(owner: u32) -> Vec<String> {
    let mut found = Vec::new();
    kill_processes(owner, &mut found);
    abort_fuse(owner);
    unmount(owner, &mut found);
    for name in namespaces(owner) {
        let path = Path::new(NAMESPACES).join(&name);
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(path);
    }
    remove_cgroups(owner);
    remove_pods(owner);
    // runc's state is shared by all containerds; the next container of the same name would find this one's.
    let _ = fs::remove_dir_all(Path::new(RUNC_STATE).join(containerd_namespace(owner)));
    let _ = fs::remove_dir_all(scratch(owner));
    found
}

/// Where the logs of a world that is gone lie, until the next one's replace them.
pub fn saved_logs() -> PathBuf {
    std::env::var_os("DARTER_LOGS").map_or_else(|| "/var/log/darter".into(), PathBuf::from).join("last-world")
}

/// Copies every file named `log` of run `owner`, so that a failure can be understood after the sweep.
pub fn save_logs(owner: u32) {
    let (from, to) = (scratch(owner), saved_logs());
    let _ = fs::remove_dir_all(&to);
    let _ = fs::create_dir_all(&to);
    let mut todo = vec![(from.clone(), 0)];
    while let Some((folder, depth)) = todo.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.file_name().is_some_and(|name| name == "log") && path.is_file() {
                let name =
                    folder.strip_prefix(&from).unwrap_or(&folder).display().to_string().replace('/', "-");
                let _ = fs::copy(&path, to.join(name));
            // As the folder has it, without a look at the file: it may be a mount that hangs.
            } else if depth < LOGS_DEPTH_MAX && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                todo.push((path, depth + 1));
            }
        }
    }
}

/// What of run `owner` can still be seen: processes, mounts, namespaces.
pub fn remains(owner: u32) -> Vec<String> {
    let mut found: Vec<String> =
        processes(owner).into_iter().map(|(pid, name)| format!("process {pid} ({name})")).collect();
    found.extend(
        mounts_below(&scratch(owner)).into_iter().map(|mount| format!("mount {}", mount.path.display())),
    );
    found.extend(namespaces(owner).into_iter().map(|name| format!("network namespace {name}")));
    found
}

/// Lets every process go that waits for a FUSE mount of this run.
pub fn abort_fuse(owner: u32) {
    for mount in mounts_below(&scratch(owner)) {
        if mount.kind.starts_with("fuse") {
            let _ = fs::write(format!("/sys/fs/fuse/connections/{}/abort", mount.minor), "1");
        }
    }
}

fn kill_processes(owner: u32, found: &mut Vec<String>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut first = true;
    loop {
        let alive = processes(owner);
        if alive.is_empty() || Instant::now() > deadline {
            return;
        }
        if first {
            found.extend(alive.iter().map(|(pid, name)| format!("process {pid} ({name})")));
        } else {
            abort_fuse(owner);
        }
        first = false;
        for pid in alive.keys() {
            let _ = kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(30));
    }
}

fn unmount(owner: u32, found: &mut Vec<String>) {
    for mount in mounts_below(&scratch(owner)).into_iter().rev() {
        found.push(format!("mount {}", mount.path.display()));
        let _ = umount2(&mount.path, MntFlags::MNT_DETACH);
    }
}

/// Containers' cgroups lie under the name of their containerd namespace, once per controller.
fn remove_cgroups(owner: u32) {
    let name = containerd_namespace(owner);
    let mut roots = vec![PathBuf::from(CGROUPS)];
    roots.extend(names(CGROUPS).iter().map(|c| Path::new(CGROUPS).join(c)));
    for root in roots {
        remove_cgroup(&root.join(&name));
    }
}

/// What pods have left outside the scratch folder, beside that of other runs: only runc's state of them, which is there as
/// long as they are, tells which are whose.
fn remove_pods(owner: u32) {
    let states = names(scratch(owner)).into_iter();
    let states = states.map(|role| scratch(owner).join(role).join("containerd").join(POD_STATE));
    let namespaces = states.flat_map(|state| names(&state).into_iter().map(move |name| state.join(name)));
    let ids: Vec<String> = namespaces.flat_map(names).collect();
    if ids.is_empty() {
        return;
    }
    for result in names(CNI_RESULTS).iter().filter(|name| names_one_of(&ids, name)) {
        let _ = fs::remove_file(Path::new(CNI_RESULTS).join(result));
    }
    remove_cgroups_of(&ids, Path::new(CGROUPS), CGROUPS_DEPTH_MAX);
}

fn names_one_of(ids: &[String], name: &str) -> bool {
    ids.iter().any(|id| name.contains(id.as_str()))
}

/// Wherever they lie and whatever is before the id in their names: both depend on containerd's version and its client.
fn remove_cgroups_of(ids: &[String], folder: &Path, depth: usize) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        if names_one_of(ids, &entry.file_name().to_string_lossy()) {
            remove_cgroup(&entry.path());
        } else if depth > 0 {
            remove_cgroups_of(ids, &entry.path(), depth - 1);
        }
    }
}

fn remove_cgroup(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        remove_cgroup(&entry.path());
    }
    let _ = fs::remove_dir(folder);
}

fn names(folder: impl AsRef<Path>) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn owner_of_namespace(name: &str) -> Option<u32> {
    name.strip_prefix("darter-")?.split('-').next()?.parse().ok()
}

fn namespaces(owner: u32) -> Vec<String> {
    names(NAMESPACES).into_iter().filter(|name| owner_of_namespace(name) == Some(owner)).collect()
}

/// Processes in a network namespace of the run, and what descends from them (containers have namespaces of their own).
fn processes(owner: u32) -> BTreeMap<u32, String> {
    let inodes: BTreeSet<u64> = namespaces(owner)
        .iter()
        .filter_map(|name| Some(fs::metadata(Path::new(NAMESPACES).join(name)).ok()?.ino()))
        .collect();
    let table = process_table();
    let mut ours: BTreeSet<u32> = table
        .keys()
        .copied()
        .filter(|pid| network_of(*pid).is_some_and(|inode| inodes.contains(&inode)))
        .collect();
    loop {
        let more: Vec<u32> = table
            .iter()
            .filter(|(pid, p)| ours.contains(&p.parent) && !ours.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            break;
        }
        ours.extend(more);
    }
    let named = |pid| table.get(&pid).filter(|p| !p.dead).map(|p| (pid, p.name.clone()));
    ours.into_iter().filter(|pid| *pid != std::process::id()).filter_map(named).collect()
}

struct Process {
    parent: u32,
    name: String,
    dead: bool,
}

fn process_table() -> BTreeMap<u32, Process> {
    names("/proc")
        .iter()
        .filter_map(|name| name.parse().ok())
        .filter_map(|pid| Some((pid, process(pid)?)))
        .collect()
}

/// From `stat`: `PID (NAME) STATE PARENT ...`, where the name may hold anything.
fn process(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let dead = matches!(fields.next()?, "Z" | "X");
    Some(Process { parent: fields.next()?.parse().ok()?, name: head.split_once('(')?.1.to_owned(), dead })
}

fn network_of(pid: u32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|meta| meta.ino())
}

/// One line of this process's mount table.
#[derive(Debug, Clone)]
pub struct Mounted {
    pub path: PathBuf,
    pub kind: String,
    /// Of the device number; for FUSE the number of its connection.
    pub minor: u32,
}

/// Mounts at or below `folder`, in the order in which they were made.
pub fn mounts_below(folder: &Path) -> Vec<Mounted> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(mounted).filter(|mount| mount.path.starts_with(folder)).collect()
}

fn mounted(line: &str) -> Option<Mounted> {
    let (left, right) = line.split_once(" - ")?;
    let mut fields = left.split(' ');
    let minor = fields.nth(2)?.split_once(':')?.1.parse().ok()?;
    let path = fields.nth(1)?.replace("\\040", " ");
    Some(Mounted { path: path.into(), kind: right.split(' ').next()?.to_owned(), minor })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_line_gives_path_kind_and_connection() {
        let mount =
            mounted("77 29 0:45 / /var/tmp/darter/1/a rw,relatime - fuse.darter darter rw").expect("a mount");
        assert_eq!((mount.path.as_path(), mount.minor), (Path::new("/var/tmp/darter/1/a"), 45));
        assert_eq!(mount.kind, "fuse.darter");
    }

    #[test]
    fn a_namespace_names_its_owner() {
        assert_eq!(owner_of_namespace(&namespace_name(42, "node-1")), Some(42));
        assert_eq!(owner_of_namespace("darter-x"), None);
        assert_eq!(owner_of_namespace("other"), None);
    }

    #[test]
    fn cgroups_of_pods_are_found_by_their_ids_alone() {
        let root = std::env::temp_dir().join(format!("darter-cgroups-{}", std::process::id()));
        let [ours, in_slice, other] =
            ["cpu/k8s.io/0123", "memory/x/test.slice:cri-containerd:0123/below", "cpu/k8s.io/4567"]
                .map(|name| root.join(name));
        for folder in [&ours, &in_slice, &other] {
            fs::create_dir_all(folder).expect("a folder");
        }
        remove_cgroups_of(&["0123".into()], &root, CGROUPS_DEPTH_MAX);
        let there = [&ours, &in_slice, &other].map(|folder| folder.exists());
        fs::remove_dir_all(&root).expect("cleaned");
        assert_eq!(there, [false, false, true]);
    }

    #[test]
    fn this_process_is_in_the_table() {
        let table = process_table();
        assert!(table.contains_key(&std::process::id()));
    }
}
