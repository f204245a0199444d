//! The program `darter`.

use std::process::ExitCode;

fn main() -> ExitCode {
    darter_cli::main()
}
