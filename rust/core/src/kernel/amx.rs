//! bf16 on AMX: tiles of 32 x 32 through inline assembly (its intrinsics are not stable, `asm!` is).
//!
//! ```text
//!              B: 16 pair rows of K x 32 lanes
//!              tmm6 (lanes 0..16)   tmm7 (16..32)
//!   A: 32 rows ┌────────┬────────┐
//!   tmm4 0..16 │  tmm0  │  tmm1  │   four tiles of C for the whole of K;
//!   tmm5 16..  │  tmm2  │  tmm3  │   a step of K = 32 is 4 loads and 4 `tdpbf16ps`
//!              └────────┴────────┘
//! ```
//!
//! A is read by `tileloadd` with its row stride, so rows of W need no packing when K is a multiple of 32;
//! B is `[K / 2][32][2]`, 128 bytes a pair row. A product whose `m` is no multiple of 32 ends in tiles of
//! fewer rows, made by reconfiguring: nothing past row `m` of A or C is touched.
//!
//! On a Sapphire Rapids core the tiles reach 1400-1500 GF/s out of L1 (peak 2500), and 0.73-0.85 of the time of
//! oneDNN's GEMM at the sizes of a language-model head.
//!
//! Rules of the hardware: Linux grants the 8 KiB of tile state per process on request, before the first tile
//! instruction ([`permitted`]); the configuration belongs to a thread ([`Kernel::begin_thread`]) and is released
//! when the thread stops multiplying, so that context switches stay cheap. `tdpbf16ps` takes subnormals as zero.
use super::{Block, Gather, Kernel, LANES, Product, isa, pack_bf16};
use core::arch::{asm, x86_64::__cpuid_count};
use half::bf16;

/// bf16 by AMX tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amx {
    isa: isa::Avx512,
}

/// Rows of one hardware tile, and K of one step in elements.
const TILE_ROWS: usize = 16;
const STEP: usize = 32;

impl Amx {
    /// An instance where processor and operating system have it.
    pub(crate) fn detect() -> Option<Self> {
        let isa = isa::Avx512::detect()?;
        // The feature macro does not know AMX on stable: leaf 7, EDX bits 22 (amx-bf16) and 24 (amx-tile).
        let leaf7 = __cpuid_count(7, 0).edx;
        let present = leaf7 >> 22 & 1 == 1 && leaf7 >> 24 & 1 == 1;
        let pairs = is_x86_feature_detected!("avx512bf16");
        (pairs && present && permitted()).then_some(Self { isa })
    }
}

/// Asks the kernel for the tile state: `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`. Idempotent;
/// fails on kernels before 5.16 and under a signal stack too small for the larger frame.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    let mut result: i64 = 158;
    // SAFETY: the call reads and writes no memory; the clobbers are those of the syscall instruction.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") 0x1023,
            in("rsi") 18,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Other systems have no such request, and we have not tried them.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Shapes all eight tiles: `upper` rows in tmm0, 1 and 4, `lower` in tmm2, 3 and 5 (none: not configured),
/// 64 bytes a row.
///
/// # Safety
/// AMX is present and permitted, `1 <= upper <= 16`, `lower <= 16`.
unsafe fn configure(upper: usize, lower: usize) {
    let mut config =
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let rows = [upper, upper, lower, lower, upper, lower, TILE_ROWS, TILE_ROWS];
    for (tile, rows) in rows.into_iter().enumerate().filter(|&(_, rows)| rows > 0) {
        config.rows[tile] = rows as u8;
        config.row_bytes[tile] = 64;
    }
    // SAFETY: the configuration is valid for palette 1: at most 16 rows of 64 bytes.
    unsafe {
        asm!(
            "ldtilecfg [{0}]",
            in(reg) &config,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly),
        );
    }
}

/// Defines `$name`: up to two tiles of rows by 32 lanes of C, the whole of K in one block of assembly, because
/// tile registers are promised to survive inside one only.
macro_rules! tiles {
    ($(#[$doc:meta])* $name:ident: start $($start:literal)*; step $($step:literal)*; end $($end:literal)*) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// `a`, `b` and `c` span the configured rows of `p`'s product; this thread is configured for them.
        unsafe fn $name(p: &Product<bf16, f32>, a: *const bf16, c: *mut f32) {
            let k_bytes = 2 * p.k;
            // SAFETY: K is `pieces` times `k / 32` steps of 64 bytes of A and 16 pair rows of B. The registers
            // that move are declared as such; memory is clobbered by default.
            unsafe {
                asm!(
                    $($start,)*
                    "3:",
                    "mov {k}, {steps}",
                    "2:",
                    $($step,)*
                    "add {a}, 64",
                    "add {a2}, 64",
                    "add {b}, 2048",
                    "dec {k}",
                    "jnz 2b",
                    "add {a}, {jump}",
                    "add {a2}, {jump}",
                    "dec {pieces}",
                    "jnz 3b",
                    $($end,)*
                    a = inout(reg) a => _,
                    a2 = inout(reg) a.wrapping_add(TILE_ROWS * p.a_row) => _,
                    a_row = in(reg) 2 * p.a_row,
                    b = inout(reg) p.b => _,
                    b_row = in(reg) 4 * LANES,
                    c = in(reg) c,
                    c2 = in(reg) c.wrapping_add(TILE_ROWS * p.c_row),
                    c_row = in(reg) 4 * p.c_row,
                    k = out(reg) _,
                    steps = in(reg) p.k / STEP,
                    pieces = inout(reg) p.pieces => _,
                    jump = in(reg) (2 * p.a_piece).wrapping_sub(k_bytes),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

/// The instructions of the two shapes; `start` is either zeroes or the tiles of C.
macro_rules! shapes {
    ($two:ident $one:ident: $s0:literal $s1:literal, $s2:literal $s3:literal) => {
        tiles!(
            /// 17 to 32 rows.
            $two:
            start $s0 $s1 $s2 $s3;
            step
                "tileloadd tmm6, [{b} + {b_row}]"
                "tileloadd tmm4, [{a} + {a_row}]"
                "tileloadd tmm7, [{b} + {b_row} + 64]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tileloadd tmm5, [{a2} + {a_row}]"
                "tdpbf16ps tmm1, tmm4, tmm7"
                "tdpbf16ps tmm2, tmm5, tmm6"
                "tdpbf16ps tmm3, tmm5, tmm7";
            end
                "tilestored [{c} + {c_row}], tmm0"
                "tilestored [{c} + {c_row} + 64], tmm1"
                "tilestored [{c2} + {c_row}], tmm2"
                "tilestored [{c2} + {c_row} + 64], tmm3"
        );
        tiles!(
            /// 1 to 16 rows.
            $one:
            start $s0 $s1;
            step
                "tileloadd tmm6, [{b} + {b_row}]"
                "tileloadd tmm4, [{a} + {a_row}]"
                "tileloadd tmm7, [{b} + {b_row} + 64]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm1, tmm4, tmm7";
            end
                "tilestored [{c} + {c_row}], tmm0"
                "tilestored [{c} + {c_row} + 64], tmm1"
                "/* {c2} */"
        );
    };
}

shapes!(two_fresh one_fresh: "tilezero tmm0" "tilezero tmm1", "tilezero tmm2" "tilezero tmm3");
shapes!(two_onto one_onto:
    "tileloadd tmm0, [{c} + {c_row}]" "tileloadd tmm1, [{c} + {c_row} + 64]",
    "tileloadd tmm2, [{c2} + {c_row}]" "tileloadd tmm3, [{c2} + {c_row} + 64]");

// SAFETY: instances come from `detect` only.
unsafe impl Kernel for Amx {
    type Element = bf16;
    type Operand = bf16;
    type Acc = f32;
    type Isa = isa::Avx512;
    const GROUP: usize = 2;
    const K_STEP: usize = STEP;
    const M_STEP: usize = 2 * TILE_ROWS;
    const COLUMN_A: bool = false;

    #[inline]
    fn isa(self) -> isa::Avx512 {
        self.isa
    }

    fn begin_thread(self) {
        // SAFETY: `self` proves that AMX is present and permitted.
        unsafe { configure(TILE_ROWS, TILE_ROWS) }
    }

    fn end_thread(self) {
        // SAFETY: as above; no tile is live between products.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }

    unsafe fn product(self, p: &Product<bf16, f32>) {
        debug_assert!(p.a_k == 1 && p.k.is_multiple_of(STEP) && p.k > 0 && p.pieces > 0);
        let both = 2 * TILE_ROWS;
        // SAFETY: each call spans rows `row ..` of the caller's product, and the thread is configured for
        // as many: 32 since `begin_thread`, fewer for the last ones, and 32 again after them.
        unsafe {
            for row in (0..p.m).step_by(both) {
                let (a, c) = (p.a.add(row * p.a_row), p.c.add(row * p.c_row));
                let rows = p.m - row;
                if rows < both {
                    configure(rows.min(TILE_ROWS), rows.saturating_sub(TILE_ROWS));
                }
                match (rows > TILE_ROWS, p.accumulate) {
                    (true, false) => two_fresh(p, a, c),
                    (true, true) => two_onto(p, a, c),
                    (false, false) => one_fresh(p, a, c),
                    (false, true) => one_onto(p, a, c),
                }
                if rows < both {
                    configure(TILE_ROWS, TILE_ROWS);
                }
            }
        }
    }

    #[inline]
    fn in_place(w: &Block<bf16>) -> Option<*const bf16> {
        w.cols.is_multiple_of(STEP).then_some(w.start)
    }

    unsafe fn pack_panel(self, rows: &Gather<bf16>, out: *mut bf16) {
        // SAFETY: the caller's contract; `detect` checked AVX-512.
        unsafe { pack_bf16::pack_panel(rows, STEP, out) }
    }

    unsafe fn pack_strip(self, rows: &Gather<bf16>, out: *mut bf16) {
        // SAFETY: the caller's contract; `detect` checked AVX-512.
        unsafe { pack_bf16::pack_strip(rows, out) }
    }

    unsafe fn pack_rows(self, w: &Block<bf16>, out: *mut bf16, out_row: usize) {
        // SAFETY: the caller's contract.
        unsafe { pack_bf16::pack_rows(w, STEP, out, out_row) }
    }

    unsafe fn pack_columns(self, w: &Block<bf16>, out: *mut bf16, out_row: usize) {
        // SAFETY: the caller's contract; `detect` checked AVX-512.
        unsafe { pack_bf16::pack_columns(w, STEP, out, out_row) }
    }

    unsafe fn store_dz(self, dz: *const f32, classes: usize, rows: *mut bf16, pairs: *mut bf16) {
        // SAFETY: the caller's contract; `detect` checked AVX-512 and its bf16 conversions.
        unsafe { pack_bf16::store_dz(dz, classes, STEP, rows, pairs) }
    }
}
