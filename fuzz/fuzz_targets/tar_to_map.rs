#![no_main]

use darter_layer::fuzzing;

libfuzzer_sys::fuzz_target!(init: darter_fuzz::plant(fuzzing::tar_seeds()), |bytes: &[u8]| fuzzing::tar(bytes));
