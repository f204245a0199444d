#![no_main]

use darter_registry::fuzzing;

libfuzzer_sys::fuzz_target!(init: darter_fuzz::plant(fuzzing::seeds()), |bytes: &[u8]| fuzzing::www_authenticate(bytes));
