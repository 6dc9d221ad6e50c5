//! Levels of instructions: found once, chosen once, forced by `LOGITLESS_CPU`.

use crate::element::DType;
use crate::error::{Error, Result};
#[cfg(target_arch = "x86_64")]
use crate::kernel::isa;
use crate::kernel::isa::Portable;
use crate::kernel::vector::Vector;
use crate::kernel::{Isa, Kernel};
use half::{bf16, f16};
use std::sync::OnceLock;

/// A set of instructions that kernels exist for, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Portable,
    Avx2,
    Avx512,
    Avx512Bf16,
    Amx,
}

impl Level {
    const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Avx2 => isa::Avx2::detect().is_some(),
            Self::Avx512 => isa::Avx512::detect().is_some(),
            Self::Avx512Bf16 => crate::kernel::bf16::Avx512Bf16::detect().is_some(),
            Self::Amx => crate::kernel::amx::Amx::detect().is_some(),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        self == Self::Portable
    }

    /// The fastest level here, or the forced one.
    fn choose() -> Result<Self> {
        let Some(value) = std::env::var_os("LOGITLESS_CPU") else {
            return Ok(Self::fastest());
        };
        let named = Self::ALL.into_iter().find(|level| value.to_str() == Some(level.name()));
        named.filter(|level| level.is_available()).ok_or_else(|| Error::Level {
            value: value.to_string_lossy().into_owned(),
            levels: levels().join(", "),
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn fastest() -> Self {
        let slow_pairs =
            |level| level == Self::Avx512Bf16 && !crate::kernel::bf16::Avx512Bf16::is_fast();
        Self::ALL
            .into_iter()
            .rfind(|&level| level.is_available() && !slow_pairs(level))
            .unwrap_or(Self::Portable)
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn fastest() -> Self {
        Self::Portable
    }

    /// The level of this process.
    fn current() -> Result<Self> {
        static CHOSEN: OnceLock<Result<Level>> = OnceLock::new();
        CHOSEN.get_or_init(Self::choose).clone()
    }
}

/// Names of the levels that this machine can run, slowest first.
pub fn levels() -> Vec<&'static str> {
    Level::ALL.into_iter().filter(|level| level.is_available()).map(Level::name).collect()
}

/// Name of the level in use: the fastest, or the one that `LOGITLESS_CPU` names when first asked.
///
/// # Errors
/// The variable names a level that is unknown or that the machine lacks.
pub fn level() -> Result<&'static str> {
    Level::current().map(Level::name)
}

/// Work that is generic over the kernel.
pub(crate) trait WithKernel {
    /// What it returns.
    type Output;
    /// The work.
    fn with<K: Kernel>(self, kernel: K) -> Self::Output;
}

/// Runs `work` with the kernel of an element type at the level in use.
pub(crate) fn dispatch<W: WithKernel>(dtype: DType, work: W) -> Result<W::Output> {
    let level = Level::current()?;
    #[cfg(target_arch = "x86_64")]
    {
        use crate::kernel::{amx::Amx, bf16::Avx512Bf16};
        if dtype == DType::Bf16
            && level == Level::Amx
            && let Some(kernel) = Amx::detect()
        {
            return Ok(work.with(kernel));
        }
        if dtype == DType::Bf16
            && level >= Level::Avx512Bf16
            && let Some(kernel) = Avx512Bf16::detect()
        {
            return Ok(work.with(kernel));
        }
        if level >= Level::Avx512
            && let Some(isa) = isa::Avx512::detect()
        {
            return Ok(at_level(isa, dtype, work));
        }
        if level >= Level::Avx2
            && let Some(isa) = isa::Avx2::detect()
        {
            return Ok(at_level(isa, dtype, work));
        }
    }
    let _ = level;
    Ok(at_level(Portable, dtype, work))
}

/// Runs `work` with the widening kernel of an element type at a vector level.
fn at_level<I: Isa, W: WithKernel>(isa: I, dtype: DType, work: W) -> W::Output {
    match dtype {
        DType::F32 => work.with(Vector::<f32, I>::new(isa)),
        DType::F64 => work.with(Vector::<f64, I>::new(isa)),
        DType::Bf16 => work.with(Vector::<bf16, I>::new(isa)),
        DType::F16 => work.with(Vector::<f16, I>::new(isa)),
        DType::I64 | DType::U8 => unreachable!("element types are checked before dispatch"),
    }
}
