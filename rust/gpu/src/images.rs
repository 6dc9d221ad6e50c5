//! The embedded images and the choice among them.
//!
//! An image is a cubin for one architecture, or PTX that the driver compiles where no cubin fits.
//! A device runs a cubin of its own major version and of its own or an earlier minor one; `sm_90a`
//! runs on 9.0 alone. Images are inflated and loaded one by one, when a kernel of theirs is first
//! launched on a device.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use crate::driver::{self, Device, Facts, Function, Library, Shape, Start};
use crate::error::{Error, Result};

/// Target of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// A100.
    Sm80,
    /// RTX 30.
    Sm86,
    /// RTX 40, L4, L40.
    Sm89,
    /// H100, H200, with the instructions of 9.0 only.
    Sm90a,
    /// RTX 50.
    Sm120,
    /// PTX for anything newer than the list.
    Compute80,
}

impl Arch {
    /// The compiler's name of the target.
    pub fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm86 => "sm_86",
            Arch::Sm89 => "sm_89",
            Arch::Sm90a => "sm_90a",
            Arch::Sm120 => "sm_120",
            Arch::Compute80 => "compute_80 (PTX)",
        }
    }
}

/// Targets that a device can run, best first.
pub fn candidates(capability: (u32, u32)) -> &'static [Arch] {
    match capability {
        (8, 0) => &[Arch::Sm80, Arch::Compute80],
        (8, 1..=8) => &[Arch::Sm86, Arch::Sm80, Arch::Compute80],
        (8, _) => &[Arch::Sm89, Arch::Sm86, Arch::Sm80, Arch::Compute80],
        (9, 0) => &[Arch::Sm90a, Arch::Compute80],
        (12, _) => &[Arch::Sm120, Arch::Compute80],
        (major, _) if major > 8 => &[Arch::Compute80],
        _ => &[],
    }
}

/// Shape and launch of a tensor-core tile.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    /// Its name in `cuda/arch.toml`.
    pub name: &'static str,
    /// Rows of a tile.
    pub m: u32,
    /// Columns of a tile.
    pub n: u32,
    /// Blocks of a cluster, along the rows.
    pub cluster: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// One embedded image.
#[derive(Debug)]
pub(crate) struct Image {
    arch: Arch,
    offset: usize,
    packed: usize,
    size: usize,
    kernels: &'static [&'static str],
    tile: Option<Tile>,
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Why this build has no kernels; empty when it has.
pub fn absent() -> &'static str {
    ABSENT
}

/// Images of each target: (target, images, kernels, bytes embedded).
pub fn inventory() -> Vec<(Arch, usize, usize, usize)> {
    let targets = [Arch::Sm80, Arch::Sm86, Arch::Sm89, Arch::Sm90a, Arch::Sm120, Arch::Compute80];
    let count = |arch: Arch| {
        let images = || IMAGES.iter().filter(move |image| image.arch == arch);
        let (kernels, bytes) = (
            images().map(|image| image.kernels.len()).sum(),
            images().map(|image| image.packed).sum(),
        );
        (arch, images().count(), kernels, bytes)
    };
    targets.map(count).into_iter().filter(|entry| entry.1 > 0).collect()
}

/// The best image of a kernel for a device, as an index.
fn find(name: &str, capability: (u32, u32)) -> Option<usize> {
    static INDEX: OnceLock<HashMap<&'static str, Vec<usize>>> = OnceLock::new();
    let index = INDEX.get_or_init(|| {
        let mut index: HashMap<_, Vec<_>> = HashMap::new();
        for (number, image) in IMAGES.iter().enumerate() {
            image.kernels.iter().for_each(|&name| index.entry(name).or_default().push(number));
        }
        index
    });
    let images = index.get(name)?;
    candidates(capability)
        .iter()
        .find_map(|&arch| images.iter().copied().find(|&image| IMAGES[image].arch == arch))
}

/// Whether a kernel can run on a device: its name and its tile.
pub fn tile(name: &str, facts: &Facts) -> Option<(&'static str, Tile)> {
    let image = &IMAGES[find(name, facts.capability)?];
    let name = image.kernels.iter().find(|other| **other == name)?;
    image.tile.filter(|tile| tile.shared <= facts.shared).map(|tile| (*name, tile))
}

/// A kernel, loaded on a device.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Its handle.
    pub function: Function,
    /// Its tile, for a tensor-core kernel.
    pub tile: Option<Tile>,
    /// Blocks of a persistent grid, for a kernel with a tile.
    pub blocks: u32,
}

/// Loads a kernel on first use; safe while a graph is captured.
pub fn kernel(device: &Device, name: &str) -> Result<Kernel> {
    type Loaded = HashMap<usize, HashMap<String, Kernel>>;
    static KERNELS: OnceLock<Mutex<Loaded>> = OnceLock::new();
    let mut loaded =
        KERNELS.get_or_init(Mutex::default).lock().unwrap_or_else(|poison| poison.into_inner());
    let loaded = loaded.entry(device.ordinal).or_default();
    if let Some(&kernel) = loaded.get(name) {
        return Ok(kernel);
    }
    let missing = || {
        let (major, minor) = device.facts.capability;
        Error::NoImage {
            kernel: name.into(),
            device: format!("{} (sm_{major}{minor})", device.facts.name),
        }
    };
    let number = find(name, device.facts.capability).ok_or_else(missing)?;
    let kernel = driver::outside_capture(|| {
        let tile = IMAGES[number].tile;
        let function = library(number)?.function(name, tile.map_or(0, |tile| tile.shared))?;
        let multiprocessors = device.facts.multiprocessors;
        let blocks = match tile {
            Some(tile) => {
                let shape = Shape {
                    grid: (1, 1),
                    block: tile.threads,
                    shared: tile.shared,
                    start: Start::After,
                };
                if tile.cluster > 1 {
                    tile.cluster * function.clusters(name, tile.cluster, multiprocessors, shape)?
                } else {
                    multiprocessors * function.blocks(name, shape)?
                }
            }
            None => 0,
        };
        Ok(Kernel { function, tile, blocks })
    })?;
    loaded.insert(name.to_owned(), kernel);
    Ok(kernel)
}

/// Loads every kernel of the images that a device prefers.
pub fn load_all(device: &Device) -> Result<()> {
    for image in IMAGES {
        for name in image.kernels {
            if find(name, device.facts.capability)
                .is_some_and(|number| std::ptr::eq(&IMAGES[number], image))
            {
                kernel(device, name)?;
            }
        }
    }
    Ok(())
}

/// An image, loaded once for all devices.
fn library(number: usize) -> Result<Library> {
    static LIBRARIES: OnceLock<Vec<OnceLock<Result<Library>>>> = OnceLock::new();
    let libraries = LIBRARIES.get_or_init(|| IMAGES.iter().map(|_| OnceLock::new()).collect());
    let load = || {
        let image = &IMAGES[number];
        let code = miniz_oxide::inflate::decompress_to_vec_with_limit(
            &BLOB[image.offset..][..image.packed],
            image.size,
        )
        .expect("the build compressed it");
        Library::load(&code)
    };
    libraries[number].get_or_init(load).clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_gets_its_own_cubin_before_an_older_one_before_ptx() {
        assert_eq!(candidates((8, 0)), [Arch::Sm80, Arch::Compute80]);
        assert_eq!(candidates((8, 7))[0], Arch::Sm86);
        assert_eq!(candidates((8, 9)), [Arch::Sm89, Arch::Sm86, Arch::Sm80, Arch::Compute80]);
        assert_eq!(candidates((9, 0))[0], Arch::Sm90a);
        assert_eq!(candidates((10, 0)), [Arch::Compute80]);
        assert_eq!(candidates((12, 1))[0], Arch::Sm120);
        assert!(candidates((7, 5)).is_empty());
    }

    #[test]
    fn every_image_inflates_to_its_size() {
        for image in IMAGES {
            let code =
                miniz_oxide::inflate::decompress_to_vec(&BLOB[image.offset..][..image.packed])
                    .unwrap();
            assert_eq!(code.len(), image.size);
            let start: &[u8] = if image.arch == Arch::Compute80 { b"//" } else { b"\x7fELF" };
            assert!(code.starts_with(start), "{:?}", image.kernels);
        }
    }

    #[test]
    fn kernels_are_unique_within_a_target() {
        for (number, image) in IMAGES.iter().enumerate() {
            for other in &IMAGES[..number] {
                let clash = image
                    .kernels
                    .iter()
                    .find(|name| other.arch == image.arch && other.kernels.contains(name));
                assert_eq!(clash, None);
            }
        }
    }
}
