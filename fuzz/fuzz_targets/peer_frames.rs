#![no_main]

use darter_mesh::fuzzing;

libfuzzer_sys::fuzz_target!(init: darter_fuzz::plant(fuzzing::seeds()), |bytes: &[u8]| fuzzing::frames(bytes));
