//! What the command does when nobody reads what it prints.

use std::process::{Command, Stdio};

#[test]
fn output_that_nobody_reads_ends_the_command_without_a_word() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.toml");
    std::fs::write(&config, "version = 2\n").unwrap();
    let ran = Command::new(env!("CARGO_BIN_EXE_darter"))
        .args(["setup", "containerd", "--containerd-version", "2.0.0", "--config"])
        .arg(&config)
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.code() == Some(141) && said.is_empty(), "{}: {said}", ran.status);
}
