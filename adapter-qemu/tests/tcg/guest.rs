//! A Linux guest that checks itself, under QEMU's TCG, which every host runs.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pageferry_qemu::{Qmp, QmpError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long the guest may take to come up, or to say its next line.
const PATIENCE: Duration = Duration::from_secs(300);

/// What all guests here are made of: a kernel, and an initramfs with nothing but `init.c`.
pub(crate) struct Guests {
    folder: tempfile::TempDir,
    kernel: PathBuf,
}

impl Guests {
    /// Says so, and why, if there can be none here.
    pub(crate) fn build() -> Option<Self> {
        let built = Self::try_build();
        if let Err(why) = &built {
            eprintln!("skipped, because {why}");
        }
        built.ok()
    }

    fn try_build() -> Result<Self, String> {
        let version = Command::new("qemu-system-x86_64").arg("--version").output();
        version.map_err(|error| format!("there is no qemu-system-x86_64 ({error})"))?;
        let kernel =
            kernel().ok_or("there is no kernel for a guest (`ci/lab install` gets one)")?;
        // RAM is here, and so is its console.
        let folder = tempfile::tempdir_in("/dev/shm").map_err(|error| error.to_string())?;
        let init = folder.path().join("init");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tcg/init.c");
        let compiled = Command::new("cc")
            .args(["-O2", "-static", "-o"])
            .arg(&init)
            .arg(source)
            .output()
            .map_err(|error| format!("there is no C compiler ({error})"))?;
        if !compiled.status.success() {
            return Err(format!("init.c: {}", String::from_utf8_lossy(&compiled.stderr)));
        }
        let program = std::fs::read(&init).map_err(|error| error.to_string())?;
        std::fs::write(folder.path().join("initrd"), initramfs(&program))
            .map_err(|error| error.to_string())?;
        Ok(Self { folder, kernel })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// QEMU's arguments for a guest that writes so many pages, on a host of that name: NAME.ram is its RAM,
    /// NAME.qmp its monitor, and at NAME.console it is listened to.
    pub(crate) fn arguments(&self, host: &str, pages: u32) -> Vec<OsString> {
        let joined = |text: &str, path: &Path, rest: &str| {
            let mut all = OsString::from(text);
            all.push(path);
            all.push(rest);
            all
        };
        let file = |kind: &str| self.path(&format!("{host}.{kind}"));
        let ram = file("ram");
        let backend = joined("memory-backend-file,id=ram,mem-path=", &ram, ",size=256M,share=on");
        let console = joined("socket,id=console,path=", &file("console"), "");
        let monitor = joined("unix:", &file("qmp"), ",server=on,wait=off");
        let command_line = format!("console=ttyS0 quiet panic=-1 pages={pages}");
        let mut arguments: Vec<OsString> = [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-m",
            "256M",
            "-machine",
            "q35,memory-backend=ram",
            "-serial",
            "chardev:console",
            "-no-reboot",
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]
        .map(OsString::from)
        .into();
        arguments.extend(["-object".into(), backend, "-chardev".into(), console]);
        arguments.extend(["-qmp".into(), monitor]);
        arguments.extend(["-kernel".into(), self.kernel.clone().into()]);
        arguments.extend(["-initrd".into(), self.path("initrd").into()]);
        arguments.extend(["-append".into(), command_line.into()]);
        arguments
    }
}

/// The kernel of the lab, which is in its folder, or one that this host boots.
fn kernel() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?.join("target/lab/kernel/boot");
    [target.as_path(), Path::new("/boot")].into_iter().find_map(|folder| {
        let files = std::fs::read_dir(folder).ok()?.flatten().map(|file| file.path());
        let mut kernels: Vec<_> = files
            .filter(|path| {
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
                    && std::fs::File::open(path).is_ok()
            })
            .collect();
        kernels.sort();
        kernels.pop()
    })
}

/// A cpio archive (newc) of a program named /init and a console for it.
fn initramfs(init: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut entry = |name: &str, mode: u32, device: (u32, u32), bytes: &[u8]| {
        let fields = [
            0,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(bytes.len()).unwrap(),
            0,
            0,
            device.0,
            device.1,
            u32::try_from(name.len() + 1).unwrap(),
            0,
        ];
        archive.extend_from_slice(b"070701");
        for field in fields {
            archive.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(bytes);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    entry("dev", 0o040_755, (0, 0), &[]);
    entry("dev/console", 0o020_600, (5, 1), &[]);
    entry("init", 0o100_755, (0, 0), init);
    entry("TRAILER!!!", 0, (0, 0), &[]);
    archive
}

/// What a guest says.
pub(crate) struct Console {
    listener: UnixListener,
    lines: Option<BufReader<UnixStream>>,
}

impl Console {
    pub(crate) fn of(guests: &Guests, host: &str) -> Self {
        let at = guests.path(&format!("{host}.console"));
        Self { listener: UnixListener::bind(at).unwrap(), lines: None }
    }

    /// The number of its next whole pass over its memory, which has found no error.
    pub(crate) fn pass(&mut self) -> u64 {
        loop {
            let lines = self.lines.get_or_insert_with(|| accept(&self.listener));
            let mut line = Vec::new();
            lines.read_until(b'\n', &mut line).expect("the guest says something");
            if line.is_empty() {
                // That QEMU is gone; another one has the guest.
                self.lines = None;
                continue;
            }
            let line = String::from_utf8_lossy(&line);
            let Some(said) = line.trim_end().strip_prefix("guest: ") else { continue };
            let words: Vec<_> = said.split(' ').collect();
            let ["pass", pass, "errors", "0"] = *words else { panic!("the guest says: {said}") };
            return pass.parse().unwrap();
        }
    }
}

/// The console of the next QEMU.
fn accept(listener: &UnixListener) -> BufReader<UnixStream> {
    let patience = Timespec { tv_sec: 300, tv_nsec: 0 };
    let polled = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&patience)).unwrap();
    assert!(polled > 0, "no QEMU has the guest");
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    BufReader::new(stream)
}

/// A QEMU that somebody started, before this program came.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) monitor: PathBuf,
}

impl Running {
    pub(crate) fn start(guests: &Guests, host: &str, pages: u32) -> Self {
        Self::with(guests, host, &guests.arguments(host, pages))
    }

    pub(crate) fn with(guests: &Guests, host: &str, arguments: &[OsString]) -> Self {
        let child = Command::new("qemu-system-x86_64")
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, monitor: guests.path(&format!("{host}.qmp")) }
    }

    /// As soon as it listens.
    pub(crate) fn connect(&self) -> Qmp {
        let began = Instant::now();
        loop {
            match Qmp::connect(&self.monitor) {
                Err(QmpError::Connect { .. }) if began.elapsed() < PATIENCE => {
                    std::thread::yield_now();
                }
                connected => return connected.unwrap(),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
