//! bf16 on AVX512-BF16: pairs multiplied by `vdpbf16ps`, statistics on AVX-512.
//!
//! Chosen on AMD, where `vdpbf16ps` does twice the work of an f32 multiply-add at the same rate (Zen 4 and 5).
//! On Intel it runs at half the f32 rate (Sapphire Rapids: 85 of 158 GF/s a core), so there bf16 goes to AMX,
//! or is widened to f32 where that is missing.
use super::{Block, Gather, Kernel, Product, isa, pack_bf16, x86};
use half::bf16;

/// bf16 by `vdpbf16ps`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Bf16 {
    isa: isa::Avx512,
}

impl Avx512Bf16 {
    /// An instance where the instructions exist, fast or not.
    pub(crate) fn detect() -> Option<Self> {
        let isa = isa::Avx512::detect()?;
        is_x86_feature_detected!("avx512bf16").then_some(Self { isa })
    }

    /// Whether they beat multiply-adds in f32: by vendor, since no processor says so.
    pub(crate) fn is_fast() -> bool {
        let id = core::arch::x86_64::__cpuid(0);
        let vendor = [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes);
        matches!(vendor.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
    }
}

// SAFETY: instances come from `detect` only.
unsafe impl Kernel for Avx512Bf16 {
    type Element = bf16;
    type Operand = bf16;
    type Acc = f32;
    type Isa = isa::Avx512;
    const GROUP: usize = 2;
    const K_STEP: usize = 2;
    const M_STEP: usize = 14;
    const COLUMN_A: bool = false;

    #[inline]
    fn isa(self) -> isa::Avx512 {
        self.isa
    }

    #[inline]
    unsafe fn product(self, p: &Product<bf16, f32>) {
        // SAFETY: the caller's contract; `self` proves the instruction set.
        unsafe { x86::avx512_bf16(p) }
    }

    #[inline]
    fn in_place(w: &Block<bf16>) -> Option<*const bf16> {
        // An odd row end would pair its last element with the next row's first: zero times nan is nan.
        w.cols.is_multiple_of(2).then_some(w.start)
    }

    unsafe fn pack_panel(self, rows: &Gather<bf16>, out: *mut bf16) {
        // SAFETY: the caller's contract; `self` proves the instruction set.
        unsafe { pack_bf16::pack_panel(rows, Self::K_STEP, out) }
    }

    unsafe fn pack_strip(self, rows: &Gather<bf16>, out: *mut bf16) {
        // SAFETY: the caller's contract; `self` proves the instruction set.
        unsafe { pack_bf16::pack_strip(rows, out) }
    }

    unsafe fn pack_rows(self, w: &Block<bf16>, out: *mut bf16, out_row: usize) {
        // SAFETY: the caller's contract.
        unsafe { pack_bf16::pack_rows(w, Self::K_STEP, out, out_row) }
    }

    unsafe fn pack_columns(self, w: &Block<bf16>, out: *mut bf16, out_row: usize) {
        // SAFETY: the caller's contract; `self` proves the instruction set.
        unsafe { pack_bf16::pack_columns(w, Self::K_STEP, out, out_row) }
    }

    unsafe fn store_dz(self, dz: *const f32, classes: usize, rows: *mut bf16, pairs: *mut bf16) {
        // SAFETY: the caller's contract; `self` proves the instruction set.
        unsafe { pack_bf16::store_dz(dz, classes, Self::K_STEP, rows, pairs) }
    }
}
