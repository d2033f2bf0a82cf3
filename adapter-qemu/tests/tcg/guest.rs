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

/// Modules that a guest needs for its disk, in the order that they are loaded in.
const MODULES: [&str; 6] = [
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
];

/// A disk of a guest.
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    /// Whether QEMU reads and writes it past the page cache.
    pub(crate) direct: bool,
}

/// What all guests here are made of: a kernel, and an initramfs with nothing but `init.c`.
pub(crate) struct Guests {
    folder: tempfile::TempDir,
    kernel: PathBuf,
    /// Pages that the guest writes, over and over.
    pub(crate) pages: u32,
    pub(crate) vcpus: u8,
    /// Names and sizes, in MiB, of what its RAM is made of: a NUMA node each, if it is not one alone.
    pub(crate) ram: Vec<(&'static str, u32)>,
    pub(crate) disk: Option<Disk>,
}

impl Guests {
    /// That write so many pages. Says so, and why, if there can be none here.
    pub(crate) fn build(pages: u32) -> Option<Self> {
        let built = Self::try_build(pages);
        if let Err(why) = &built {
            eprintln!("skipped, because {why}");
        }
        built.ok()
    }

    fn try_build(pages: u32) -> Result<Self, String> {
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
        let modules = modules_of(&kernel);
        std::fs::write(folder.path().join("initrd"), initramfs(&program, &modules))
            .map_err(|error| error.to_string())?;
        Ok(Self { folder, kernel, pages, vcpus: 1, ram: vec![("ram", 256)], disk: None })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The files of its RAM on a host of that name.
    pub(crate) fn ram_files(&self, host: &str) -> Vec<PathBuf> {
        self.ram.iter().map(|(id, _)| self.path(&format!("{host}.{id}"))).collect()
    }

    /// QEMU's arguments for the guest on a host of that name; at NAME.console it is listened to.
    pub(crate) fn arguments(&self, host: &str) -> Vec<OsString> {
        let joined = |text: &str, path: &Path, rest: &str| {
            let mut all = OsString::from(text);
            all.push(path);
            all.push(rest);
            all
        };
        let file = |kind: &str| self.path(&format!("{host}.{kind}"));
        let console = joined("socket,id=console,path=", &file("console"), "");
        let (pages, disk) = (self.pages, u8::from(self.disk.is_some()));
        let command_line = format!("console=ttyS0 quiet panic=-1 pages={pages} disk={disk}");
        let mut arguments: Vec<OsString> = [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-serial",
            "chardev:console",
            "-no-reboot",
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]
        .map(OsString::from)
        .into();
        arguments.extend(["-chardev".into(), console, "-m".into()]);
        let mebibytes: u32 = self.ram.iter().map(|(_, mebibytes)| mebibytes).sum();
        arguments.extend([format!("{mebibytes}M").into(), "-machine".into()]);
        match &*self.ram {
            [(id, _)] => arguments.push(format!("q35,memory-backend={id}").into()),
            nodes => {
                arguments.push("q35".into());
                let nodes = nodes.iter().map(|(id, _)| format!("node,memdev={id}"));
                arguments.extend(nodes.flat_map(|node| ["-numa".into(), node.into()]));
            }
        }
        for ((id, mebibytes), path) in self.ram.iter().zip(self.ram_files(host)) {
            let backend =
                format!("memory-backend-file,id={id},size={mebibytes}M,share=on,mem-path=");
            arguments.extend(["-object".into(), joined(&backend, &path, "")]);
        }
        arguments.extend(["-kernel".into(), self.kernel.clone().into()]);
        arguments.extend(["-initrd".into(), self.path("initrd").into()]);
        arguments.extend(["-append".into(), command_line.into()]);
        arguments.extend(["-smp".into(), self.vcpus.to_string().into()]);
        if let Some(Disk { path, direct }) = &self.disk {
            let cache = if *direct { "on" } else { "off" };
            let node = format!("driver=file,node-name=disk0,cache.direct={cache},filename=");
            arguments.extend(["-blockdev".into(), joined(&node, path, "")]);
            arguments.extend(["-device".into(), "virtio-blk-pci,drive=disk0".into()]);
        }
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

/// Names and bytes of the modules of a kernel that a guest's disk needs; those that are not there are built in.
fn modules_of(kernel: &Path) -> Vec<(String, Vec<u8>)> {
    let name = kernel.file_name().unwrap_or_default().to_string_lossy();
    let version = name.strip_prefix("vmlinuz-").unwrap_or_default();
    let boot = kernel.parent().unwrap_or(kernel);
    // Beside /boot, in /lib or in /usr/lib.
    let folders = [boot.join("../lib/modules"), boot.join("../usr/lib/modules")];
    let module = |(order, module): (usize, &&str)| {
        let (folder, name) = module.split_once('/')?;
        let files = folders.iter().find_map(|modules| {
            std::fs::read_dir(modules.join(version).join("kernel/drivers").join(folder)).ok()
        });
        let file = files?.flatten().find(|file| {
            file.file_name().to_string_lossy().split_once('.').is_some_and(|(stem, _)| stem == name)
        })?;
        let name = format!("{order}-{}", file.file_name().to_string_lossy());
        Some((name, std::fs::read(file.path()).ok()?))
    };
    MODULES.iter().enumerate().filter_map(module).collect()
}

/// A cpio archive (newc) of a program named /init, a console for it, and modules.
fn initramfs(init: &[u8], modules: &[(String, Vec<u8>)]) -> Vec<u8> {
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
    entry("modules", 0o040_755, (0, 0), &[]);
    for (name, module) in modules {
        entry(&format!("modules/{name}"), 0o100_644, (0, 0), module);
    }
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
        self.pass_of("memory")
    }

    /// The number of the next whole pass by that of its processes, which, as all others, has found no error.
    pub(crate) fn pass_of(&mut self, process: &str) -> u64 {
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
            let [name, "pass", pass, "errors", "0"] = *words else {
                panic!("the guest says: {said}")
            };
            if name == process {
                return pass.parse().unwrap();
            }
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
    pub(crate) fn start(guests: &Guests, host: &str) -> Self {
        Self::with(guests, host, &guests.arguments(host))
    }

    pub(crate) fn with(guests: &Guests, host: &str, arguments: &[OsString]) -> Self {
        let monitor = guests.path(&format!("{host}.qmp"));
        let child = Command::new("qemu-system-x86_64")
            .args(arguments)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", monitor.display()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, monitor }
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
