//! MBPP: a function that a model wrote, run against its tests in a process of its own.
//!
//! The process has limits on time (5 s of CPU, 10 s of wall clock), memory (1 GiB) and files (none may
//! grow), an empty environment and directory, and an audit hook that refuses to write or read files
//! other than Python's own, to start processes and to open sockets. That holds off accidents, not an
//! attacker: do not point it at a model that somebody else can prompt.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{Error, Result, io};

const WALL_S_MAX: u64 = 10;
const PASSED: &str = "passed";

/// Runs before the answer: output goes nowhere but for the verdict, then the doors close.
const BEFORE: &str = r#"
def _close_doors():
    import sys, os
    out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1); os.dup2(null, 2)
    homes = tuple(p for p in sys.path if p)
    write = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    harmless = ("os.listdir", "os.scandir", "os.putenv")
    refused = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "mmap.", "fcntl.", "signal.")
    def hook(event, args):
        if event == "open":
            path, _, flags = args
            if not isinstance(path, str) or not path.startswith(homes) or (flags or 0) & write:
                raise PermissionError(event)
        elif event.startswith(refused) and event not in harmless:
            raise PermissionError(event)
    sys.addaudithook(hook)
    return lambda: os.write(out, b"passed")
_passed = _close_doors()
def _run(program, passed):
    exec(program, {"__name__": "answer"})
    passed()
"#;

/// Refuses a Python that cannot run an empty program under the limits: each answer would look wrong.
pub fn probe(python: &str) -> Result<()> {
    run(python, "pass")?.map_err(|why| {
        Error::Invalid(format!(
            "python `{python}`: an empty program did not pass: {why}"
        ))
    })
}

/// Right when every test of the item holds.
pub fn check(python: &str, item: &Value, text: &str) -> Result<std::result::Result<(), String>> {
    let tests: Vec<&str> = item["tests"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let setup = item["setup"].as_str().unwrap_or_default().replace('\r', "");
    let program = format!("{}\n{setup}\n{}\n", block(text), tests.join("\n"));
    run(python, &program)
}

/// The first fenced block, or the whole text.
fn block(text: &str) -> &str {
    let Some((_, after)) = text.split_once("```") else {
        return text;
    };
    let body = after.split_once('\n').map_or("", |(_, body)| body);
    body.split("```").next().unwrap_or(body)
}

/// Runs a program; right when it reaches its end.
fn run(python: &str, program: &str) -> Result<std::result::Result<(), String>> {
    let directory = tempdir()?;
    // A JSON string is a Python string too.
    let literal = Value::from(program);
    let source = format!("{BEFORE}\n_run({literal}, _passed)\n");
    let child = Command::new("sh")
        .args([
            "-c",
            "ulimit -t 5 && ulimit -v 1048576 && ulimit -f 0 && ulimit -c 0 && exec \"$0\" -I -S -B -c \"$1\"",
            python,
            &source,
        ])
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .current_dir(&directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let verdict = child.map_err(io(std::path::Path::new("sh"))).and_then(wait);
    let _ = std::fs::remove_dir(&directory);
    verdict
}

/// An empty directory, gone after the run.
fn tempdir() -> Result<std::path::PathBuf> {
    static RUNS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let run = RUNS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("kilotok-answer-{}-{run}", std::process::id()));
    std::fs::create_dir(&path).map_err(io(&path))?;
    Ok(path)
}

fn wait(mut child: std::process::Child) -> Result<std::result::Result<(), String>> {
    let start = Instant::now();
    let late = loop {
        if child
            .try_wait()
            .map_err(io(std::path::Path::new("python3")))?
            .is_some()
        {
            break false;
        }
        if start.elapsed() > Duration::from_secs(WALL_S_MAX) {
            let _ = child.kill();
            let _ = child.wait();
            break true;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let (mut said, mut complaint) = (String::new(), String::new());
    child
        .stdout
        .take()
        .map(|mut out| out.read_to_string(&mut said));
    child
        .stderr
        .take()
        .map(|mut err| err.read_to_string(&mut complaint));
    if !complaint.is_empty() {
        // The program's own complaints go nowhere: this is the shell's or the interpreter's start.
        return Err(Error::Invalid(format!("python: {}", complaint.trim())));
    }
    Ok(match (said == PASSED, late) {
        (true, _) => Ok(()),
        (_, true) => Err(format!("ran longer than {WALL_S_MAX} s")),
        (false, false) => Err("a test failed, or a limit was reached".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(program: &str) -> bool {
        run("python3", program).unwrap().is_ok()
    }

    #[test]
    fn tests_decide() {
        let item = serde_json::json!({"tests": ["assert f(2) == 4", "assert f(3) == 9"], "setup": "import math\r\n"});
        let text = "Sure:\n```python\ndef f(x):\n    return x * x\n```\nDone.";
        assert_eq!(check("python3", &item, text).unwrap(), Ok(()));
        assert!(
            check("python3", &item, "def f(x): return 2 * x")
                .unwrap()
                .is_err()
        );
        assert!(check("python3", &item, "I cannot.").unwrap().is_err());
    }

    #[test]
    fn the_library_is_there() {
        assert!(right(
            "import re, math, collections, heapq, itertools, functools, datetime, string\nprint(1)"
        ));
    }

    #[test]
    fn limits_hold() {
        assert!(!right("while True: pass"), "time");
        assert!(!right("x = bytearray(2 << 30)"), "memory");
    }

    #[test]
    fn doors_are_closed() {
        assert!(right("pass"));
        for program in [
            "open('x', 'w')",
            "open('/etc/passwd').read()",
            "import os; os.system('true')",
            "import subprocess; subprocess.run(['true'])",
            "import os; os.fork()",
            "import os; os.remove('/tmp/nothing')",
            "import socket; socket.create_connection(('127.0.0.1', 9))",
        ] {
            let guarded = format!(
                "try:\n    {}\nexcept PermissionError: raise\nexcept BaseException: pass",
                program.replace("; ", "\n    ")
            );
            assert!(!right(&guarded), "{program}");
        }
    }

    #[test]
    fn leaving_early_is_no_pass() {
        assert!(!right("import sys; sys.exit(0)"));
        assert!(!right("raise SystemExit"));
    }

    #[test]
    fn a_python_that_is_missing_is_named() {
        let error = run("no-such-python", "pass").unwrap_err().to_string();
        assert!(error.contains("no-such-python"), "{error}");
    }
}
