//! What a guest boots.

use std::path::{Path, PathBuf};

/// Modules that a guest needs for its disk, in the order that they are loaded in.
const MODULES: [&str; 6] = [
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
];

/// A kernel, and where its modules may be.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) image: PathBuf,
    modules: [PathBuf; 2],
}

impl Kernel {
    /// That of the lab, which is in its folder, or one that this host boots.
    pub(super) fn find() -> Option<Self> {
        let lab = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?.join("target/lab");
        [lab.join("kernel"), "/".into()].into_iter().find_map(|root| {
            let files = std::fs::read_dir(root.join("boot")).ok()?.flatten();
            let mut kernels: Vec<_> = files
                .filter(|file| std::fs::File::open(file.path()).is_ok())
                .filter_map(|file| file.file_name().into_string().ok())
                .filter_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned))
                .collect();
            kernels.sort();
            let version = kernels.pop()?;
            // What is packed unpacks itself, which takes five seconds in emulation.
            let unpacked = lab.join(format!("vmlinux-{version}"));
            let packed = root.join(format!("boot/vmlinuz-{version}"));
            let image = if unpacked.exists() { unpacked } else { packed };
            let modules = ["lib/modules", "usr/lib/modules"];
            Some(Self { image, modules: modules.map(|folder| root.join(folder).join(&version)) })
        })
    }

    /// Names and bytes of the modules that a guest's disk needs; those that are not there are built in.
    pub(super) fn modules(&self) -> Vec<(String, Vec<u8>)> {
        let module = |(order, module): (usize, &&str)| {
            let (folder, name) = module.split_once('/')?;
            let drivers = format!("kernel/drivers/{folder}");
            let files =
                self.modules.iter().find_map(|of| std::fs::read_dir(of.join(&drivers)).ok());
            let file = files?.flatten().find(|file| {
                let file = file.file_name();
                file.to_string_lossy().split_once('.').is_some_and(|(stem, _)| stem == name)
            })?;
            let name = format!("{order}-{}", file.file_name().to_string_lossy());
            Some((name, std::fs::read(file.path()).ok()?))
        };
        MODULES.iter().enumerate().filter_map(module).collect()
    }
}

/// A cpio archive (newc) of a program named /init, a console for it, and modules.
pub(super) fn initramfs(init: &[u8], modules: &[(String, Vec<u8>)]) -> Vec<u8> {
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
