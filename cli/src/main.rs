//! The program `darter`.

use std::process::ExitCode;

// The daemon's memory stays near what it uses: with the system's allocator, freed piece buffers stay with the process.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    darter_cli::main()
}
