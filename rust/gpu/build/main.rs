//! Compiles `cuda/kernels` to cubins with NVRTC and embeds them.
//!
//! No CUDA toolkit is needed: the compiler is a shared library in a wheel, which the interpreter
//! that maturin names knows. The result is one file of compressed images and one generated table
//! of kernels; `src/images.rs` chooses among them at run time.
//!
//! | variable | meaning |
//! |---|---|
//! | `LOGITLESS_CUDA` | `auto` (default: without a compiler the build is CPU-only and says so), `require`, `0` or `off` |
//! | `LOGITLESS_NVRTC` | folder that holds `libnvrtc.so.12`, or a site-packages folder; else `PYO3_PYTHON`, then `python3` are asked |
//! | `LOGITLESS_CUDA_ARCHS` | comma-separated subset of `cuda/arch.toml` for quick development builds |
//! | `LOGITLESS_CUDA_CACHE` | folder of compiled images shared between target folders; else `OUT_DIR` |
//! | `LOGITLESS_KERNELS_LOCK` | `check` fails when `kernels.lock` is out of date, `write` renews it |

mod manifest;
mod nvrtc;
mod report;

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use manifest::Job;
use nvrtc::{Compiled, Nvrtc};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() {
    for name in
        ["LOGITLESS_CUDA", "LOGITLESS_NVRTC", "LOGITLESS_CUDA_ARCHS", "LOGITLESS_CUDA_CACHE"]
    {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-env-changed=LOGITLESS_KERNELS_LOCK");
    println!("cargo::rerun-if-env-changed=PYO3_PYTHON");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let cuda = root.join("../../cuda");
    println!("cargo::rerun-if-changed={}", cuda.display());
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=kernels.lock");

    if let Err(error) = build(&root, &cuda) {
        // One directive a line: cargo shows each as an error of its own.
        for line in error.to_string().lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn build(root: &Path, cuda: &Path) -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let mode = env::var("LOGITLESS_CUDA").unwrap_or_else(|_| "auto".into());
    let required = match mode.as_str() {
        "0" | "off" => return write_table(&out, &[], "LOGITLESS_CUDA=0 at build time"),
        "auto" | "" => false,
        "require" | "1" => true,
        other => return Err(format!("LOGITLESS_CUDA={other}: expected auto, require or 0").into()),
    };
    let compiler = match Nvrtc::find() {
        Ok(compiler) => compiler,
        Err(why) if required => return Err(format!("LOGITLESS_CUDA={mode}: {why}").into()),
        Err(why) => {
            println!("cargo::warning=CPU-only build: {why}");
            return write_table(&out, &[], "NVRTC 12.9 was not found when the extension was built");
        }
    };
    let jobs = manifest::jobs(cuda)?;
    let images = compile_all(&compiler, &jobs, cuda, &out)?;
    report::check(&jobs, &images, &root.join("kernels.lock"))?;
    let images: Vec<_> = jobs.iter().zip(images).collect();
    write_table(&out, &images, "")
}

/// Compiles what is not cached, on as many threads as cargo allows, and keeps the order of `jobs`.
fn compile_all(compiler: &Nvrtc, jobs: &[Job], cuda: &Path, out: &Path) -> Result<Vec<Compiled>> {
    let cache =
        env::var_os("LOGITLESS_CUDA_CACHE").map_or_else(|| out.join("images"), PathBuf::from);
    fs::create_dir_all(&cache)?;
    let include = cuda.join("include");
    let threads = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<Result<Compiled>>>> =
        jobs.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..jobs.len().min(threads) {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let index = jobs.iter().position(|other| std::ptr::eq(other, job));
                    let result = compile_cached(compiler, job, &include, &cache);
                    *results[index.expect("a job of this slice")]
                        .lock()
                        .expect("no panic inside") = Some(result);
                }
            });
        }
    });
    let mut images = Vec::with_capacity(jobs.len());
    let mut failures = String::new();
    for result in results {
        match result.into_inner()?.expect("every job ran") {
            Ok(image) => images.push(image),
            Err(error) => writeln!(failures, "{error}")?,
        }
    }
    if failures.is_empty() { Ok(images) } else { Err(failures.into()) }
}

/// One image, from the cache when neither its sources, its options nor the compiler changed.
fn compile_cached(compiler: &Nvrtc, job: &Job, include: &Path, cache: &Path) -> Result<Compiled> {
    let mut hasher = DefaultHasher::new();
    (compiler.version, nvrtc::FORMAT, &job.options).hash(&mut hasher);
    hash_sources(&job.file, include, &mut Vec::new(), &mut hasher)?;
    let path = cache.join(format!("{}-{:016x}", job.label(), hasher.finish()));
    if let Ok(bytes) = fs::read(&path)
        && let Some(image) = Compiled::from_bytes(&bytes)
    {
        return Ok(image);
    }
    let image = compiler.compile(job, include)?;
    let scratch = path.with_extension(format!("tmp{}", std::process::id()));
    fs::write(&scratch, image.to_bytes())?;
    fs::rename(&scratch, &path)?;
    Ok(image)
}

/// Feeds a file and everything it includes with quotes into the hash.
fn hash_sources(
    file: &Path,
    include: &Path,
    seen: &mut Vec<PathBuf>,
    hasher: &mut DefaultHasher,
) -> Result<()> {
    if seen.iter().any(|path| path == file) {
        return Ok(());
    }
    seen.push(file.to_path_buf());
    let text = fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    text.hash(hasher);
    for line in text.lines() {
        let Some(name) =
            line.trim().strip_prefix("#include \"").and_then(|rest| rest.split('"').next())
        else {
            continue;
        };
        let beside = file.with_file_name(name);
        let found = if beside.exists() { beside } else { include.join(name) };
        hash_sources(&found, include, seen, hasher)?;
    }
    Ok(())
}

/// Writes `images.bin` (all images, compressed, one after the other) and `images.rs` (their table).
fn write_table(out: &Path, images: &[(&Job, Compiled)], absent: &str) -> Result<()> {
    let mut blob = Vec::new();
    let mut table = String::from("// Generated by build/main.rs.\n");
    writeln!(table, "pub(crate) const ABSENT: &str = {absent:?};")?;
    writeln!(
        table,
        "pub(crate) static BLOB: &[u8] = include_bytes!(concat!(env!(\"OUT_DIR\"), \"/images.bin\"));"
    )?;
    writeln!(table, "pub(crate) static IMAGES: &[Image] = &[")?;
    for (job, image) in images {
        let packed = miniz_oxide::deflate::compress_to_vec(&image.code, 9);
        let names: Vec<_> = image.kernels.iter().map(|kernel| kernel.name.as_str()).collect();
        writeln!(
            table,
            "    Image {{ arch: Arch::{}, offset: {}, packed: {}, size: {}, kernels: &{names:?}, tile: {} }},",
            job.arch.variant(),
            blob.len(),
            packed.len(),
            image.code.len(),
            job.tile
                .as_ref()
                .map_or_else(|| "None".into(), |tile| format!("Some({})", tile.literal())),
        )?;
        blob.extend(packed);
    }
    writeln!(table, "];")?;
    fs::write(out.join("images.bin"), blob)?;
    fs::write(out.join("images.rs"), table)?;
    Ok(())
}
