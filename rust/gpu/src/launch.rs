//! A stream of one device, and launches on it.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};

use logitless_core::DType;

use crate::driver::{self, Current, Device, Shape, Start, TensorMap};
use crate::error::Result;
use crate::images::{self, Kernel};
use crate::params;

/// Whether the last launch of the process was a product: behind one, there is nothing to gain from
/// coming onto the device early, and profilers would count the wait. A hint, whatever threads and
/// streams there are.
static BEHIND_PRODUCT: AtomicBool = AtomicBool::new(true);

/// The caller's stream, with its device's context current for as long as this lives.
pub(crate) struct Stream {
    pub device: &'static Device,
    /// As frameworks give it.
    pub handle: usize,
    _current: Current,
}

impl Stream {
    /// Enters a device. `handle` is the stream as frameworks give it: 0 is the default stream.
    pub fn enter(ordinal: usize, handle: usize) -> Result<Stream> {
        let device = driver::device(ordinal)?;
        Ok(Stream { device, handle, _current: device.enter()? })
    }

    /// Launches a kernel that takes one parameter struct. It may come onto the device while the kernel
    /// ahead of it still runs, for it waits before anything else (`KERNEL` in `common.cuh`).
    ///
    /// # Safety
    /// The parameters name memory that is valid for what the kernel does with it.
    pub unsafe fn launch<P>(
        &self,
        name: &str,
        grid: (usize, usize),
        block: u32,
        shared: u32,
        params: &P,
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        let kernel = images::kernel(self.device, name)?;
        let start = if BEHIND_PRODUCT.swap(false, Ordering::Relaxed) {
            Start::After
        } else {
            self.device.start(Start::Beside)
        };
        let shape = Shape { grid: (grid.0 as u32, grid.1 as u32), block, shared, start };
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: every kernel launched here takes the one struct by value and is a KERNEL, all of whose
        // blocks wait for the kernel ahead at their start; the rest is the caller's promise.
        unsafe { kernel.function.launch(name, self.handle, shape, &mut arguments) }
    }

    /// Launches a tensor-core kernel as so many clusters; sm_90 kernels also take `maps`.
    ///
    /// # Safety
    /// As for `launch`, and `start` is sound for the kernel ahead.
    pub unsafe fn launch_tiles(
        &self,
        name: &str,
        kernel: Kernel,
        clusters: usize,
        start: Start,
        maps: Option<&[TensorMap; 3]>,
        params: &params::Gemm,
    ) -> Result<()> {
        BEHIND_PRODUCT.store(true, Ordering::Relaxed);
        let tile = kernel.tile.expect("a tensor-core kernel has a tile");
        let grid = (clusters as u32 * tile.cluster, 1);
        let shape = Shape { grid, block: tile.threads, shared: tile.shared, start };
        let params = std::ptr::from_ref(params).cast_mut().cast::<c_void>();
        let mut arguments = [params; 4];
        let arguments = match maps {
            Some(maps) => {
                for (argument, map) in arguments.iter_mut().zip(maps) {
                    *argument = std::ptr::from_ref(map).cast_mut().cast();
                }
                &mut arguments[..]
            }
            None => &mut arguments[..1],
        };
        // SAFETY: the kernels of `gemm_sm90.cu` take three maps and the struct, those of
        // `gemm_sm80.cu` the struct alone; the rest is the caller's promise.
        unsafe { kernel.function.launch(name, self.handle, shape, arguments) }
    }

    /// Fills memory with zeros.
    ///
    /// # Safety
    /// The bytes are writable device memory.
    pub unsafe fn zero(&self, address: usize, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { driver::zero(address, bytes, self.handle) }
    }
}

/// The type's part of a kernel's name.
pub(crate) fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::F64 => "f64",
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
        DType::I64 | DType::U8 => unreachable!("checked: a float tensor"),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    /// `Stream::launch` counts on it; products come with an order of their own.
    #[test]
    fn every_kernel_takes_its_turn() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cuda/kernels");
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let product = path.file_name().unwrap().to_string_lossy().starts_with("gemm_sm");
            let text = fs::read_to_string(&path).unwrap();
            assert!(
                product || text.contains("KERNEL(") && !text.contains("__global__"),
                "{path:?}"
            );
        }
    }
}
