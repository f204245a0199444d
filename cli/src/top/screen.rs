//! The terminal while `darter top` has it: another page, no cursor, keys without an Enter. All is as before when it is dropped.

use std::io::{self, Read, Write};

use nix::sys::termios::{
    LocalFlags, SetArg, SpecialCharacterIndices as Index, Termios, tcgetattr, tcsetattr,
};

/// The second page, so that what was on the first is there again afterwards; the cursor is hidden.
const BEGIN: &str = "\x1b[?1049h\x1b[?25l";
const END: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const REST_OF_LINE: &str = "\x1b[K";
const REST_OF_PAGE: &str = "\x1b[J";

pub struct Screen {
    before: Termios,
}

impl Screen {
    /// Takes the terminal. Ctrl-C still sends SIGINT; Ctrl-Z does nothing, as it would leave the second page behind.
    pub fn open() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut mode = before.clone();
        mode.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
        // A read answers at once, with nothing if no key was pressed.
        mode.control_chars[Index::VMIN as usize] = 0;
        mode.control_chars[Index::VTIME as usize] = 0;
        // What POSIX calls disabled, on Linux.
        mode.control_chars[Index::VSUSP as usize] = 0;
        tcsetattr(io::stdin(), SetArg::TCSANOW, &mode)?;
        let screen = Self { before };
        screen.write(BEGIN)?;
        Ok(screen)
    }

    /// Lines and columns; those of the oldest terminals if it doesn't say.
    pub fn size(&self) -> (usize, usize) {
        let (lines, columns) = console::Term::stdout().size_checked().unwrap_or((24, 80));
        (lines.into(), columns.into())
    }

    /// These lines in place of those before.
    pub fn show(&self, lines: &[String]) -> io::Result<()> {
        let lines: Vec<String> = lines.iter().map(|line| format!("{line}{REST_OF_LINE}")).collect();
        self.write(&format!("{HOME}{}{REST_OF_PAGE}", lines.join("\n")))
    }

    /// Whether q was pressed since it was last asked.
    pub fn is_quit(&self) -> io::Result<bool> {
        let mut keys = [0; 64];
        let count = io::stdin().lock().read(&mut keys)?;
        Ok(keys[..count].iter().any(|key| matches!(key, b'q' | b'Q')))
    }

    fn write(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Without a terminal there is nothing to put back.
        let _ = self.write(END);
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}
