//! The driver, behind the few calls that this crate makes.
//!
//! `libcuda` is opened on first use and never linked. Every call returns a `Result` that carries
//! the driver's own name and text of the error. torch's context is used, the primary one of each
//! device: it is retained once and pushed for the duration of a call, because autograd threads may
//! have no context at all.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;

use cudarc::driver::sys::{self as cu, CUresult};

use crate::error::{Error, Result};

/// Oldest driver interface with the calls used here: library loading, launch attributes, tensor maps.
const MINIMUM_VERSION: i32 = 12_000;

/// Turns a status into a `Result`.
fn check(code: CUresult, call: impl FnOnce() -> String) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: writes a pointer to a static string, or null for a code that it does not know.
        unsafe { get(code, &mut text) };
        if text.is_null() {
            return format!("code {}", code as u32);
        }
        // SAFETY: not null, zero-terminated and static.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    };
    Err(Error::Driver {
        call: call(),
        name: text(cu::cuGetErrorName),
        text: text(cu::cuGetErrorString),
    })
}

/// The opened and initialised driver.
#[derive(Debug)]
pub struct Driver {
    /// As the driver counts: 12040 is 12.4.
    pub version: i32,
    /// Number of visible devices.
    pub devices: i32,
    process: u32,
}

/// The driver, or why there is none. A forked child gets an error once its parent used CUDA.
pub fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
    let driver = DRIVER.get_or_init(open).as_ref().map_err(Clone::clone)?;
    if driver.process != std::process::id() {
        return Err(Error::Unavailable {
            reason: "this process was forked after its parent had used CUDA, which CUDA does not survive; \
                     start workers with multiprocessing.get_context(\"spawn\")"
                .into(),
        });
    }
    Ok(driver)
}

fn open() -> Result<Driver> {
    let unavailable = |reason: String| Error::Unavailable { reason };
    // SAFETY: opens the library by its names and runs its initialisers. cudarc panics without it,
    // so this comes first.
    if !unsafe { cu::is_culib_present() } {
        return Err(unavailable("libcuda.so.1 was not found; install the NVIDIA driver".into()));
    }
    // SAFETY: the first call of the driver; the argument must be 0.
    check(unsafe { cu::cuInit(0) }, || "cuInit".into())
        .map_err(|error| unavailable(error.to_string()))?;
    let (mut version, mut devices) = (0, 0);
    // SAFETY: writes one integer.
    check(unsafe { cu::cuDriverGetVersion(&mut version) }, || "cuDriverGetVersion".into())?;
    if version < MINIMUM_VERSION {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(unavailable(format!(
            "the driver speaks CUDA {major}.{minor}; CUDA 12.0 is needed: install driver 525 or newer"
        )));
    }
    // SAFETY: writes one integer.
    check(unsafe { cu::cuDeviceGetCount(&mut devices) }, || "cuDeviceGetCount".into())?;
    Ok(Driver { version, devices, process: std::process::id() })
}

/// What a device is; read once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its name, such as `NVIDIA H200`.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most shared memory of a block, in bytes.
    pub shared: u32,
}

#[cfg(test)]
impl Facts {
    /// An H200, for tests of what is decided without a device.
    pub fn h200() -> Facts {
        Facts { name: "test".into(), capability: (9, 0), multiprocessors: 132, shared: 232_448 }
    }
}

/// A device and its primary context.
#[derive(Debug)]
pub struct Device {
    /// Index among the visible devices.
    pub ordinal: usize,
    /// What it is.
    pub facts: Facts,
    context: cu::CUcontext,
}

// SAFETY: a context may be pushed by any thread; the handle is never destroyed.
unsafe impl Send for Device {}
// SAFETY: see above.
unsafe impl Sync for Device {}

/// More devices than one process sees in practice.
const MAX_DEVICES: usize = 64;

/// A device by index; its context is retained for the life of the process.
pub fn device(ordinal: usize) -> Result<&'static Device> {
    static DEVICES: [OnceLock<Result<Device>>; MAX_DEVICES] =
        [const { OnceLock::new() }; MAX_DEVICES];
    let driver = driver()?;
    if ordinal >= MAX_DEVICES || ordinal >= driver.devices as usize {
        let reason =
            format!("device {ordinal} was asked for and the driver sees {}", driver.devices);
        return Err(Error::Unavailable { reason });
    }
    DEVICES[ordinal].get_or_init(|| Device::open(ordinal)).as_ref().map_err(Clone::clone)
}

impl Device {
    fn open(ordinal: usize) -> Result<Device> {
        use cu::CUdevice_attribute as Attribute;
        let mut device = 0;
        // SAFETY: writes one handle.
        check(unsafe { cu::cuDeviceGet(&mut device, ordinal as c_int) }, || {
            format!("cuDeviceGet({ordinal})")
        })?;
        let attribute = |attribute: Attribute| -> Result<u32> {
            let mut value = 0;
            // SAFETY: writes one integer.
            check(unsafe { cu::cuDeviceGetAttribute(&mut value, attribute, device) }, || {
                format!("{attribute:?}")
            })?;
            Ok(value as u32)
        };
        let mut name = [0; 256];
        // SAFETY: writes at most 256 characters with a final zero.
        check(unsafe { cu::cuDeviceGetName(name.as_mut_ptr(), 256, device) }, || {
            "cuDeviceGetName".into()
        })?;
        // SAFETY: zero-terminated by the call above.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let mut context = null_mut();
        // SAFETY: writes one handle; the reference is kept for the life of the process.
        check(unsafe { cu::cuDevicePrimaryCtxRetain(&mut context, device) }, || {
            "cuDevicePrimaryCtxRetain".into()
        })?;
        Ok(Device { ordinal, facts: Facts { name, capability, multiprocessors, shared }, context })
    }

    /// `start`, or `After` on a device or a driver that knows nothing else. Drivers before 12.3 have no
    /// such edges between the kernels of a captured graph.
    pub fn start(&self, start: Start) -> Start {
        const WITH_GRAPHS: i32 = 12_030;
        let able = self.facts.capability >= (9, 0)
            && driver().is_ok_and(|driver| driver.version >= WITH_GRAPHS);
        if able { start } else { Start::After }
    }

    /// Makes the device's context current until the guard is dropped.
    pub fn enter(&self) -> Result<Current> {
        // SAFETY: the context lives as long as the process.
        check(unsafe { cu::cuCtxPushCurrent_v2(self.context) }, || "cuCtxPushCurrent".into())?;
        Ok(Current(std::marker::PhantomData))
    }
}

/// A pushed context; popping it on drop gives the thread back what it had.
#[derive(Debug)]
pub struct Current(std::marker::PhantomData<*mut ()>);

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = null_mut();
        // SAFETY: pops what `enter` pushed on this thread (the guard is not Send). The status is
        // dropped: it only repeats an error of the work in between.
        let _ = unsafe { cu::cuCtxPopCurrent_v2(&mut context) };
    }
}

/// A loaded kernel of the current context.
#[derive(Clone, Copy, Debug)]
pub struct Function(cu::CUfunction);

// SAFETY: a handle that the driver lets any thread launch; its library is never unloaded.
unsafe impl Send for Function {}
// SAFETY: see above.
unsafe impl Sync for Function {}

/// A loaded image; context-free, never unloaded.
#[derive(Clone, Copy, Debug)]
pub struct Library(cu::CUlibrary);

// SAFETY: as for `Function`.
unsafe impl Send for Library {}
// SAFETY: as for `Function`.
unsafe impl Sync for Library {}

impl Library {
    /// Loads a cubin, or PTX that ends in a zero byte.
    pub fn load(image: &[u8]) -> Result<Library> {
        let mut library = null_mut();
        // SAFETY: the image is complete (checked by its decompression) and copied by the call.
        let code = unsafe {
            cu::cuLibraryLoadData(
                &mut library,
                image.as_ptr().cast(),
                null_mut(),
                null_mut(),
                0,
                null_mut(),
                null_mut(),
                0,
            )
        };
        check(code, || "cuLibraryLoadData".into())?;
        Ok(Library(library))
    }

    /// A kernel by name, loaded into the current context, with its dynamic shared memory allowed.
    pub fn function(self, name: &str, shared: u32) -> Result<Function> {
        let (mut kernel, mut function) = (null_mut(), null_mut());
        let symbol = CString::new(name).expect("kernel names hold no zero byte");
        // SAFETY: writes one handle.
        check(unsafe { cu::cuLibraryGetKernel(&mut kernel, self.0, symbol.as_ptr()) }, || {
            format!("cuLibraryGetKernel({name})")
        })?;
        // SAFETY: writes one handle, for the context that the caller entered.
        check(unsafe { cu::cuKernelGetFunction(&mut function, kernel) }, || {
            format!("cuKernelGetFunction({name})")
        })?;
        if shared > 48 * 1024 {
            let attribute =
                cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: an attribute of a loaded function.
            check(unsafe { cu::cuFuncSetAttribute(function, attribute, shared as c_int) }, || {
                format!("{name} with {shared} bytes of shared memory")
            })?;
        }
        Ok(Function(function))
    }
}

/// Runs `load` so that it cannot break a graph capture of this or another thread: loading an image
/// is refused under the default capture mode.
pub fn outside_capture<T>(load: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: swaps this thread's mode with the value behind the pointer.
    check(unsafe { cu::cuThreadExchangeStreamCaptureMode(&mut mode) }, || {
        "cuThreadExchangeStreamCaptureMode".into()
    })?;
    let result = load();
    // SAFETY: puts the previous mode back.
    check(unsafe { cu::cuThreadExchangeStreamCaptureMode(&mut mode) }, || {
        "cuThreadExchangeStreamCaptureMode".into()
    })?;
    result
}

/// When a kernel may start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// Once all work ahead of it on the stream has ended.
    #[default]
    After,
    /// Once every block of the kernel right ahead of it has asked for dependents
    /// (`ptx::launch_dependents`) or ended. The kernel must call `ptx::wait_for_grid_ahead` in every
    /// block: before it touches what the kernel ahead writes, or writes what that one touches; and
    /// in any case before it ends, because what follows waits for this kernel alone. What lies
    /// further back is complete where the kernel ahead was launched `After`, or waited at its start.
    ///
    /// Compute capability 9.0 and newer; [`Device::start`] says `After` where this is not to be had.
    Beside,
}

/// Grid, block and shared memory of a launch, and when it starts.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Blocks along x and y.
    pub grid: (u32, u32),
    /// Threads a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// When the kernel may start.
    pub start: Start,
}

impl Shape {
    /// Without attributes: cluster dimensions are the kernel's own.
    fn config(self, stream: usize) -> cu::CUlaunchConfig {
        cu::CUlaunchConfig {
            gridDimX: self.grid.0,
            gridDimY: self.grid.1,
            gridDimZ: 1,
            blockDimX: self.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: stream as cu::CUstream,
            attrs: null_mut(),
            numAttrs: 0,
        }
    }
}

/// A launch attribute, its value all zeros.
fn attribute(id: cu::CUlaunchAttributeID) -> cu::CUlaunchAttribute {
    // SAFETY: an all-zero value is valid for this union of plain integers.
    let mut attribute: cu::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = id;
    attribute
}

impl Function {
    /// Enqueues the kernel.
    ///
    /// # Safety
    /// `arguments` are the kernel's parameters, in order, each a pointer to a value of its type;
    /// device memory that they name outlives the launch on `stream`. A kernel launched `Beside` waits
    /// as [`Start::Beside`] says.
    pub unsafe fn launch(
        self,
        name: &str,
        stream: usize,
        shape: Shape,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let mut config = shape.config(stream);
        let mut attribute = attribute(
            cu::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        );
        if shape.start == Start::Beside {
            attribute.value.programmaticStreamSerializationAllowed = 1;
            (config.attrs, config.numAttrs) = (&mut attribute, 1);
        }
        // SAFETY: the caller's promise; parameters and attribute are copied before the call returns.
        let code =
            unsafe { cu::cuLaunchKernelEx(&config, self.0, arguments.as_mut_ptr(), null_mut()) };
        check(code, || {
            format!(
                "launch of {name} with grid {:?}, {} threads, {} bytes of shared memory",
                shape.grid, shape.block, shape.shared
            )
        })
    }

    /// Blocks that one multiprocessor holds at once.
    pub fn blocks(self, name: &str, shape: Shape) -> Result<u32> {
        let mut blocks = 0;
        // SAFETY: writes one integer.
        let code = unsafe {
            cu::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                self.0,
                shape.block as c_int,
                shape.shared as usize,
            )
        };
        check(code, || format!("cuOccupancyMaxActiveBlocksPerMultiprocessor({name})"))?;
        Ok(blocks as u32)
    }

    /// Clusters of `cluster` blocks that the device holds at once.
    pub fn clusters(
        self,
        name: &str,
        cluster: u32,
        multiprocessors: u32,
        shape: Shape,
    ) -> Result<u32> {
        let mut config =
            Shape { grid: (multiprocessors / cluster * cluster, 1), ..shape }.config(0);
        let mut attribute =
            attribute(cu::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
        attribute.value.clusterDim.x = cluster;
        attribute.value.clusterDim.y = 1;
        attribute.value.clusterDim.z = 1;
        (config.attrs, config.numAttrs) = (&mut attribute, 1);
        let mut clusters = 0;
        // SAFETY: writes one integer; the configuration and its attribute outlive the call.
        check(unsafe { cu::cuOccupancyMaxActiveClusters(&mut clusters, self.0, &config) }, || {
            format!("cuOccupancyMaxActiveClusters({name})")
        })?;
        Ok(clusters as u32)
    }
}

/// Fills memory with zeros.
///
/// # Safety
/// `bytes` bytes at `address` are writable device memory until the stream has passed.
pub unsafe fn zero(address: usize, bytes: usize, stream: usize) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    check(unsafe { cu::cuMemsetD8Async(address as u64, 0, bytes, stream as cu::CUstream) }, || {
        "cuMemsetD8Async".into()
    })
}

/// A matrix as the copy engine of sm_90 reads or writes it; passed to kernels by value.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct TensorMap(cu::CUtensorMap);

/// A matrix in device memory, its rows `pitch` bytes apart, and the box that one copy moves.
#[derive(Clone, Copy, Debug)]
pub struct TensorMapSpec {
    /// First element; a multiple of 16 bytes.
    pub address: usize,
    /// Element type.
    pub dtype: logitless_core::DType,
    /// Elements along the contiguous axis, and rows. Copies fill zeros outside.
    pub extent: (usize, usize),
    /// Bytes from row to row; a multiple of 16.
    pub pitch: usize,
    /// Elements and rows of a box.
    pub tile: (u32, u32),
}

impl TensorMap {
    /// Encodes a map with the 128-byte swizzle and 128-byte L2 promotion (measured best).
    pub fn encode(spec: TensorMapSpec) -> Result<TensorMap> {
        use cu::CUtensorMapDataType as Type;
        use logitless_core::DType;
        let dtype = match spec.dtype {
            DType::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            _ => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let extent = [spec.extent.0 as u64, spec.extent.1 as u64];
        let (pitch, tile, step) = ([spec.pitch as u64], [spec.tile.0, spec.tile.1], [1_u32, 1]);
        let mut map = cu::CUtensorMap { opaque: [0; 16] };
        // SAFETY: a pure computation on the host; every array has the rank's length.
        let code = unsafe {
            cu::cuTensorMapEncodeTiled(
                &mut map,
                dtype,
                2,
                spec.address as *mut c_void,
                extent.as_ptr(),
                pitch.as_ptr(),
                tile.as_ptr(),
                step.as_ptr(),
                cu::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                cu::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                cu::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                cu::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check(code, || format!("cuTensorMapEncodeTiled({spec:?})"))?;
        Ok(TensorMap(map))
    }
}
