//! `cuda/arch.toml`: which kernels are built, from which file, for which architecture.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::Result;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    /// Names of the operations, in the order of their numbers.
    operations: Vec<String>,
    /// Names of the element types, in the order of their numbers.
    dtypes: Vec<String>,
    tile: BTreeMap<String, Tile>,
    unit: Vec<Unit>,
}

/// Shape and resources of a tensor-core tile; the kernel asserts that the shared memory suffices.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tile {
    #[serde(skip)]
    name: String,
    m: u32,
    n: u32,
    cluster: u32,
    pingpong: bool,
    threads: u32,
    #[serde(default)]
    shared: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unit {
    file: String,
    arch: Vec<Arch>,
    /// Empty: one image with every kernel of the file.
    #[serde(default)]
    operations: Vec<String>,
    #[serde(default)]
    dtypes: Vec<String>,
    /// Logit maps to build: 0 scale only, 1 bias and softcap too.
    #[serde(default)]
    maps: Vec<u32>,
    #[serde(default)]
    tile: String,
    /// Depth of the operand ring, and store panels a warpgroup.
    #[serde(default)]
    stages: u32,
    #[serde(default)]
    panels: u32,
    /// Every kernel of the unit must compile without a spill; the build fails otherwise.
    #[serde(default)]
    spill_free: bool,
}

/// Target of one image.
#[derive(Clone, Copy, Deserialize, PartialEq)]
pub enum Arch {
    #[serde(rename = "sm_80")]
    Sm80,
    #[serde(rename = "sm_86")]
    Sm86,
    #[serde(rename = "sm_89")]
    Sm89,
    #[serde(rename = "sm_90a")]
    Sm90a,
    #[serde(rename = "sm_120")]
    Sm120,
    #[serde(rename = "compute_80")]
    Compute80,
}

impl Arch {
    /// The compiler's name.
    pub fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm86 => "sm_86",
            Arch::Sm89 => "sm_89",
            Arch::Sm90a => "sm_90a",
            Arch::Sm120 => "sm_120",
            Arch::Compute80 => "compute_80",
        }
    }

    /// The variant of `images::Arch`.
    pub fn variant(self) -> &'static str {
        match self {
            Arch::Sm80 => "Sm80",
            Arch::Sm86 => "Sm86",
            Arch::Sm89 => "Sm89",
            Arch::Sm90a => "Sm90a",
            Arch::Sm120 => "Sm120",
            Arch::Compute80 => "Compute80",
        }
    }
}

impl Tile {
    /// The initialiser of `images::Tile`.
    pub fn literal(&self) -> String {
        format!(
            "Tile {{ name: {:?}, m: {}, n: {}, cluster: {}, threads: {}, shared: {} }}",
            self.name, self.m, self.n, self.cluster, self.threads, self.shared
        )
    }
}

/// One image to compile.
pub struct Job {
    pub file: PathBuf,
    pub arch: Arch,
    pub options: Vec<String>,
    pub tile: Option<Tile>,
    pub spill_free: bool,
    name: String,
}

impl Job {
    /// Unique among the jobs, fit for a file name.
    pub fn label(&self) -> String {
        format!("{}-{}", self.name, self.arch.name())
    }
}

/// Expands the table into one job an image, in the order of the file.
pub fn jobs(cuda: &Path) -> Result<Vec<Job>> {
    let path = cuda.join("arch.toml");
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let manifest: Manifest =
        toml::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    let only = env::var("LOGITLESS_CUDA_ARCHS").ok();
    let wanted = |arch: Arch| {
        only.as_ref().is_none_or(|list| list.split(',').any(|name| name == arch.name()))
    };

    let mut jobs = Vec::new();
    for unit in &manifest.unit {
        let file = cuda.join("kernels").join(&unit.file);
        for &arch in unit.arch.iter().filter(|&&arch| wanted(arch)) {
            if unit.operations.is_empty() {
                let name = unit.file.trim_end_matches(".cu").to_owned();
                let (file, options) = (file.clone(), Vec::new());
                jobs.push(Job {
                    file,
                    arch,
                    options,
                    tile: None,
                    spill_free: unit.spill_free,
                    name,
                });
                continue;
            }
            let mut tile = manifest
                .tile
                .get(&unit.tile)
                .cloned()
                .ok_or_else(|| format!("{}: no tile {:?}", path.display(), unit.tile))?;
            tile.name.clone_from(&unit.tile);
            if tile.shared == 0 {
                tile.shared = unit.stages * ((tile.m + tile.n) * 128 + 16) + unit.panels * 2 * 8192;
            }
            for operation in &unit.operations {
                for dtype in &unit.dtypes {
                    for &map in &unit.maps {
                        let suffix = if map == 0 { "" } else { "m" };
                        let name = format!("{operation}_{dtype}{suffix}_{}", unit.tile);
                        let options = options(&manifest, unit, &tile, &name, operation, dtype, map)
                            .ok_or_else(|| {
                                format!("{}: {name}: unknown operation or dtype", path.display())
                            })?;
                        let (file, tile) = (file.clone(), Some(tile.clone()));
                        jobs.push(Job {
                            file,
                            arch,
                            options,
                            tile,
                            spill_free: unit.spill_free,
                            name,
                        });
                    }
                }
            }
        }
    }
    Ok(jobs)
}

/// The macros that make one kernel out of a file.
fn options(
    manifest: &Manifest,
    unit: &Unit,
    tile: &Tile,
    name: &str,
    operation: &str,
    dtype: &str,
    map: u32,
) -> Option<Vec<String>> {
    let number = |names: &[String], name: &str| names.iter().position(|other| other == name);
    let operation = number(&manifest.operations, operation)?;
    let dtype = number(&manifest.dtypes, dtype)?;
    let mut options: Vec<_> = (manifest.operations.iter().enumerate())
        .map(|(number, name)| format!("-DOP_{}={number}", name.to_uppercase()))
        .chain(
            (manifest.dtypes.iter().enumerate())
                .map(|(number, name)| format!("-DDTYPE_{}={number}", name.to_uppercase())),
        )
        .collect();
    options.extend([
        format!("-DNAME={name}"),
        format!("-DOP={operation}"),
        format!("-DDTYPE={dtype}"),
        format!("-DMAP={map}"),
        format!("-DTILE_M={}", tile.m),
        format!("-DTILE_N={}", tile.n),
        format!("-DSTAGES={}", unit.stages),
        format!("-DPANELS={}", unit.panels),
        format!("-DCLUSTER={}", tile.cluster),
        format!("-DPINGPONG={}", u32::from(tile.pingpong)),
        format!("-DTHREADS={}", tile.threads),
        format!("-DSMEM={}", tile.shared),
    ]);
    Some(options)
}
