//! Runs a process and meddles with one of its file system calls: kills it before the call, tears a write in half, or fails the call.
//!
//! All threads of the process are followed; calls are counted in the order in which they begin, whichever thread makes them.
#![allow(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{Error, Read, Result};
use std::mem::{MaybeUninit, size_of};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::ptr::null_mut;

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fault {
    /// Every thread dies before the call does anything.
    Kill,
    /// A write puts down half of its bytes, then every thread dies. Other calls: as `Kill`.
    Torn,
    /// A write puts down half of its bytes and says so.
    Short,
    /// The call fails with this number.
    Errno(i32),
    /// This call and all that follow fail with this number.
    ErrnoFromHere(i32),
}

/// What became of the process.
pub struct Traced {
    /// The calls that were counted, as far as the process came.
    pub calls: Vec<String>,
    /// Its exit status; None if a signal ended it.
    pub status: Option<i32>,
    pub output: String,
}

/// What happens when a call under way returns.
#[derive(Clone, Copy)]
enum AtReturn {
    Die,
    Fail(i32),
}

struct Tracer<'a> {
    process: libc::pid_t,
    under: &'a Path,
    fault: Option<(usize, Fault)>,
    calls: Vec<String>,
    at_return: HashMap<libc::pid_t, AtReturn>,
    inside: HashSet<libc::pid_t>,
    known: HashSet<libc::pid_t>,
}

/// Runs the command; the call numbered `fault.0`, counted from 1, of those that change something in `under` is meddled with.
pub fn run(command: &mut Command, under: &Path, fault: Option<(usize, Fault)>) -> Result<Traced> {
    // SAFETY: between fork and exec only one system call is made, which allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, null_mut::<u8>(), null_mut::<u8>()) {
            -1 => Err(Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let process = child.id() as libc::pid_t;
    let (mut tracer, none) = (
        Tracer {
            process,
            under,
            fault,
            calls: Vec::new(),
            at_return: HashMap::new(),
            inside: HashSet::new(),
            known: HashSet::from([process]),
        },
        0,
    );
    let (_, status) = wait(process)?;
    assert!(libc::WIFSTOPPED(status), "a traced process stops at its first instruction, not with status {status:#x}");
    let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACESYSGOOD;
    ptrace(libc::PTRACE_SETOPTIONS, process, options as usize)?;
    ptrace(libc::PTRACE_SYSCALL, process, none)?;
    let status = tracer.follow()?;
    let mut output = String::new();
    child.stderr.take().expect("it was piped").read_to_string(&mut output)?;
    Ok(Traced { calls: tracer.calls, status, output })
}

impl Tracer<'_> {
    fn follow(&mut self) -> Result<Option<i32>> {
        loop {
            let (thread, status) = wait(-1)?;
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                if thread == self.process {
                    return Ok(libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)));
                }
                continue;
            }
            let signal = libc::WSTOPSIG(status);
            let mut deliver = 0;
            if signal == libc::SIGTRAP | 0x80 {
                self.system_call(thread)?;
            } else if status >> 16 == 0 && (self.known.contains(&thread) || signal != libc::SIGSTOP) {
                deliver = signal as usize;
            }
            self.known.insert(thread);
            // A thread that was killed meanwhile cannot go on; its end is reported next.
            let _ = ptrace(libc::PTRACE_SYSCALL, thread, deliver);
        }
    }

    fn system_call(&mut self, thread: libc::pid_t) -> Result<()> {
        if !self.inside.remove(&thread) {
            self.inside.insert(thread);
            return self.begins(thread);
        }
        match self.at_return.remove(&thread) {
            None => {}
            Some(AtReturn::Die) => self.kill(),
            Some(AtReturn::Fail(errno)) => {
                let mut registers = registers(thread)?;
                registers.rax = (-i64::from(errno)) as u64;
                set_registers(thread, &registers)?;
            }
        }
        Ok(())
    }

    fn begins(&mut self, thread: libc::pid_t) -> Result<()> {
        // A thread of a process that was just killed has no registers any more.
        let Ok(mut registers) = registers(thread) else { return Ok(()) };
        let Some((name, path)) = self.change(thread, &registers) else { return Ok(()) };
        if !path.starts_with(self.under) {
            return Ok(());
        }
        self.calls.push(format!("{name} {}", path.strip_prefix(self.under).unwrap_or(&path).display()));
        let Some((at, fault)) = self.fault else { return Ok(()) };
        let (number, write) = (self.calls.len(), name == "write" && registers.rdx > 1);
        let now = number == at || (number > at && matches!(fault, Fault::ErrnoFromHere(_)));
        match fault {
            _ if !now => {}
            Fault::Torn | Fault::Short if write => {
                registers.rdx /= 2;
                set_registers(thread, &registers)?;
                if fault == Fault::Torn {
                    self.at_return.insert(thread, AtReturn::Die);
                }
            }
            Fault::Short => {}
            Fault::Kill | Fault::Torn => self.kill(),
            Fault::Errno(errno) | Fault::ErrnoFromHere(errno) => {
                registers.orig_rax = u64::MAX;
                set_registers(thread, &registers)?;
                self.at_return.insert(thread, AtReturn::Fail(errno));
            }
        }
        Ok(())
    }

    fn kill(&self) {
        // SAFETY: the process is a child that has not been waited for, so the number is still its own.
        unsafe { libc::kill(self.process, libc::SIGKILL) };
    }

    /// The name of a call that changes files, and the path that it changes.
    fn change(&self, thread: libc::pid_t, registers: &libc::user_regs_struct) -> Option<(&'static str, PathBuf)> {
        let (first, second, third) = (registers.rdi, registers.rsi, registers.rdx);
        let writes = |flags: u64| flags as i32 & (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC) != 0;
        let here = libc::AT_FDCWD as u64;
        let (name, path) = match registers.orig_rax as libc::c_long {
            libc::SYS_write | libc::SYS_pwrite64 => ("write", descriptor(thread, first)),
            libc::SYS_fsync | libc::SYS_fdatasync => ("fsync", descriptor(thread, first)),
            libc::SYS_ftruncate => ("ftruncate", descriptor(thread, first)),
            libc::SYS_rename => ("rename", path_at(thread, here, first)),
            libc::SYS_renameat | libc::SYS_renameat2 => ("rename", path_at(thread, first, second)),
            libc::SYS_mkdir => ("mkdir", path_at(thread, here, first)),
            libc::SYS_mkdirat => ("mkdir", path_at(thread, first, second)),
            libc::SYS_unlink | libc::SYS_rmdir => ("unlink", path_at(thread, here, first)),
            libc::SYS_unlinkat => ("unlink", path_at(thread, first, second)),
            libc::SYS_open if writes(second) => ("open", path_at(thread, here, first)),
            libc::SYS_openat if writes(third) => ("open", path_at(thread, first, second)),
            _ => return None,
        };
        Some((name, path?))
    }
}

fn descriptor(thread: libc::pid_t, number: u64) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{thread}/fd/{}", number as i32)).ok()
}

fn path_at(thread: libc::pid_t, folder: u64, address: u64) -> Option<PathBuf> {
    let memory = fs::File::open(format!("/proc/{thread}/mem")).ok()?;
    let mut bytes = Vec::new();
    while !bytes.contains(&0) && bytes.len() < libc::PATH_MAX as usize {
        // Not past the end of a page, as the next may not be there.
        let at = address + bytes.len() as u64;
        let mut page = vec![0; 4096 - (at % 4096) as usize];
        memory.read_exact_at(&mut page, at).ok()?;
        bytes.extend(page);
    }
    let text = std::str::from_utf8(bytes.split(|byte| *byte == 0).next()?).ok()?;
    let folder =
        if folder as i32 == libc::AT_FDCWD { fs::read_link(format!("/proc/{thread}/cwd")).ok()? } else { descriptor(thread, folder)? };
    Some(folder.join(text))
}

fn wait(process: libc::pid_t) -> Result<(libc::pid_t, i32)> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call. Only children of this thread are waited for, so tests do not take each other's.
        let thread = unsafe { libc::waitpid(process, &mut status, libc::__WALL | libc::__WNOTHREAD) };
        if thread >= 0 {
            return Ok((thread, status));
        }
        let error = Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn ptrace(request: libc::c_uint, thread: libc::pid_t, data: usize) -> Result<()> {
    // SAFETY: the requests made through here read and write no memory of this process.
    match unsafe { libc::ptrace(request, thread, null_mut::<u8>(), data) } {
        -1 => Err(Error::last_os_error()),
        _ => Ok(()),
    }
}

fn registers(thread: libc::pid_t) -> Result<libc::user_regs_struct> {
    let mut registers = MaybeUninit::<libc::user_regs_struct>::zeroed();
    assert_eq!(size_of::<libc::user_regs_struct>(), 27 * 8, "what the kernel writes");
    // SAFETY: the kernel fills the struct, which is large enough; all zeros is a value of it, too.
    match unsafe { libc::ptrace(libc::PTRACE_GETREGS, thread, null_mut::<u8>(), registers.as_mut_ptr()) } {
        -1 => Err(Error::last_os_error()),
        // SAFETY: it holds integers only, and every byte of it was written.
        _ => Ok(unsafe { registers.assume_init() }),
    }
}

fn set_registers(thread: libc::pid_t, registers: &libc::user_regs_struct) -> Result<()> {
    // SAFETY: the kernel reads the struct, which outlives the call.
    match unsafe { libc::ptrace(libc::PTRACE_SETREGS, thread, null_mut::<u8>(), registers as *const libc::user_regs_struct) } {
        -1 => Err(Error::last_os_error()),
        _ => Ok(()),
    }
}
