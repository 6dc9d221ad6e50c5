//! The compiler: `libnvrtc.so.12` from its wheel, opened at build time.

use std::env;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::{null, null_mut};

use libloading::Library;

use crate::Result;
use crate::manifest::{Arch, Job};
use crate::report;

/// Part of the cache key: raise it when `Compiled` or the common options change.
pub const FORMAT: u32 = 2;

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
type Message = unsafe extern "C" fn(c_int) -> *const c_char;

/// Resources of one kernel as ptxas reports them (zero for PTX, which is not assembled here).
pub struct Kernel {
    pub name: String,
    pub registers: u32,
    pub shared: u32,
    pub stack: u32,
    pub spill_stores: u32,
    pub spill_loads: u32,
}

/// One compiled image: a cubin, or PTX with its final zero.
pub struct Compiled {
    pub code: Vec<u8>,
    pub kernels: Vec<Kernel>,
}

impl Compiled {
    /// One line a kernel, an empty line, the code.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for k in &self.kernels {
            let numbers = format!(
                "{} {} {} {} {}",
                k.registers, k.shared, k.stack, k.spill_stores, k.spill_loads
            );
            bytes.extend(format!("{} {numbers}\n", k.name).bytes());
        }
        bytes.push(b'\n');
        bytes.extend(&self.code);
        bytes
    }

    /// The inverse of `to_bytes`; nothing when the file was cut short.
    pub fn from_bytes(bytes: &[u8]) -> Option<Compiled> {
        let split = if bytes.first() == Some(&b'\n') {
            0
        } else {
            bytes.windows(2).position(|two| two == b"\n\n")? + 1
        };
        let mut kernels = Vec::new();
        for line in std::str::from_utf8(&bytes[..split]).ok()?.lines() {
            let mut words = line.split(' ');
            let name = words.next()?.to_owned();
            let mut number = || words.next()?.parse().ok();
            let (registers, shared, stack) = (number()?, number()?, number()?);
            kernels.push(Kernel {
                name,
                registers,
                shared,
                stack,
                spill_stores: number()?,
                spill_loads: number()?,
            });
        }
        Some(Compiled { code: bytes[split + 1..].to_vec(), kernels })
    }
}

/// The opened compiler.
pub struct Nvrtc {
    library: Library,
    pub version: (i32, i32),
}

impl Nvrtc {
    /// Opens the compiler of the wheel, or says where it was looked for.
    pub fn find() -> Result<Nvrtc> {
        let (folder, source) = folder()?;
        let library = folder.join("libnvrtc.so.12");
        // SAFETY: NVRTC's initialisers are those of an ordinary shared library. It finds its
        // builtins beside itself.
        let library = unsafe { Library::new(&library) }
            .map_err(|error| format!("{} (from {source}): {error}", library.display()))?;
        let mut version = (0, 0);
        // SAFETY: the documented signature; both pointers outlive the call.
        let code =
            unsafe { library.get::<Version>(b"nvrtcVersion")?(&mut version.0, &mut version.1) };
        // A cubin of a 13.x compiler does not load on a 12.x driver; one before 12.8 knows no sm_120.
        if code != 0 || version.0 != 12 || version.1 < 8 {
            let found = format!("{}.{} in {}", version.0, version.1, folder.display());
            return Err(format!(
                "NVRTC {found}: expected 12.8 or 12.9; pip install nvidia-cuda-nvrtc-cu12==12.9.86"
            )
            .into());
        }
        Ok(Nvrtc { library, version })
    }

    /// Compiles one image; the error holds the compiler's log, which names file and line.
    pub fn compile(&self, job: &Job, include: &Path) -> Result<Compiled> {
        let source = CString::new(std::fs::read_to_string(&job.file)?)?;
        let name = CString::new(job.file.to_string_lossy().into_owned())?;
        let ptx = job.arch == Arch::Compute80;
        let mut options = vec![
            format!("--gpu-architecture={}", job.arch.name()),
            "--std=c++17".to_owned(),
            "--device-as-default-execution-space".to_owned(),
            format!("-I{}", include.display()),
        ];
        if !ptx {
            options.push("--ptxas-options=-v".to_owned());
        }
        options.extend(job.options.iter().cloned());
        let options: Vec<_> =
            options.into_iter().map(CString::new).collect::<std::result::Result<_, _>>()?;
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();

        let mut program: Program = null_mut();
        // SAFETY: here and below, the signatures are those of nvrtc.h 12; every pointer is valid
        // for the call, sizes come from the library itself, and the program is destroyed once.
        let code = unsafe {
            self.library.get::<Create>(b"nvrtcCreateProgram")?(
                &mut program,
                source.as_ptr(),
                name.as_ptr(),
                0,
                null(),
                null(),
            )
        };
        self.expect(code, job)?;
        // SAFETY: see above.
        let code = unsafe {
            self.library.get::<Compile>(b"nvrtcCompileProgram")?(
                program,
                pointers.len() as c_int,
                pointers.as_ptr(),
            )
        };
        let log = self.text(program, b"nvrtcGetProgramLogSize", b"nvrtcGetProgramLog")?;
        let log = String::from_utf8_lossy(log.strip_suffix(&[0]).unwrap_or(&log)).into_owned();
        if code != 0 {
            return Err(format!("{} does not compile:\n{log}", job.label()).into());
        }
        let compiled = if ptx {
            let code = self.text(program, b"nvrtcGetPTXSize", b"nvrtcGetPTX")?;
            Compiled { kernels: report::entries(&String::from_utf8_lossy(&code)), code }
        } else {
            let code = self.text(program, b"nvrtcGetCUBINSize", b"nvrtcGetCUBIN")?;
            Compiled { kernels: report::parse(&log), code }
        };
        // SAFETY: see above.
        unsafe { self.library.get::<Destroy>(b"nvrtcDestroyProgram")?(&mut program) };
        // These say that ptxas gave up overlapping the tensor cores or ignored a register budget.
        if let Some(line) = log.lines().find(|line| line.contains("(C75")) {
            return Err(format!("{}: {line}", job.label()).into());
        }
        Ok(compiled)
    }

    fn text(&self, program: Program, size: &[u8], get: &[u8]) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: the documented signatures; the buffer has the size that the library asks for.
        unsafe {
            self.library.get::<Size>(size)?(program, &mut bytes);
            let mut buffer = vec![0_u8; bytes];
            self.library.get::<Text>(get)?(program, buffer.as_mut_ptr().cast());
            Ok(buffer)
        }
    }

    fn expect(&self, code: c_int, job: &Job) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: returns a static string for any code.
        let message =
            unsafe { CStr::from_ptr(self.library.get::<Message>(b"nvrtcGetErrorString")?(code)) };
        Err(format!("{}: NVRTC error {code}: {}", job.label(), message.to_string_lossy()).into())
    }
}

/// The folder of `libnvrtc.so.12`, and who named it.
fn folder() -> Result<(PathBuf, String)> {
    if let Some(path) = env::var_os("LOGITLESS_NVRTC").map(PathBuf::from) {
        let inside = path.join("nvidia/cuda_nvrtc/lib");
        let folder = if inside.is_dir() { inside } else { path };
        return Ok((folder, "LOGITLESS_NVRTC".into()));
    }
    let python = env::var("PYO3_PYTHON").unwrap_or_else(|_| "python3".into());
    let script =
        "import os, nvidia.cuda_nvrtc as m; print(os.path.join(list(m.__path__)[0], 'lib'))";
    let output = Command::new(&python)
        .args(["-c", script])
        .output()
        .map_err(|error| format!("{python}: {error}"))?;
    if !output.status.success() {
        let fix = "pip install nvidia-cuda-nvrtc-cu12==12.9.86 there, or set LOGITLESS_NVRTC";
        return Err(format!(
            "{python} has no nvidia.cuda_nvrtc (the compiler of the kernels): {fix}"
        )
        .into());
    }
    Ok((PathBuf::from(String::from_utf8(output.stdout)?.trim()), python))
}
