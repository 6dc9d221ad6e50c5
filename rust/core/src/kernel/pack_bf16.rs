//! Packing of bf16 pairs on AVX-512: what both `vdpbf16ps` and AMX read.
//!
//! Both multiply *pairs*, so every transpose here is one of 32-bit lanes: 16 x 16 of them in 64 shuffles.
//!
//! | function | reads | writes |
//! |---|---|---|
//! | [`pack_panel`] | rows, K along memory | `[k / 2][32][2]` |
//! | [`pack_strip`] | rows, K across them | `[row / 2][32][2]` |
//! | [`pack_rows`] | rows | rows, K padded with zeros |
//! | [`pack_columns`] | rows, K across them | columns, K along memory and padded |
//! | [`store_dz`] | `f32 [class][32]` | `[class][32]` and `[class / 2][32][2]` |
//!
//! `k_step` is what K is padded to: 2 for `vdpbf16ps`, 32 for AMX. Steps other than one, which only odd
//! caller layouts have, take the scalar loop of `scalar`. Packing costs one pass over an operand that is then
//! read N or V times.
use super::{Block, Gather, LANES};
use core::arch::x86_64::*;
use half::bf16;

/// Elements of one packed row of pairs.
const PAIR_ROW: usize = 2 * LANES;

/// Right operand from vectors along K; the contract is that of `Kernel::pack_panel`.
///
/// # Safety
/// That contract, and AVX-512 F and BW are present.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn pack_panel(rows: &Gather<bf16>, k_step: usize, out: *mut bf16) {
    let padded = rows.len.next_multiple_of(k_step);
    if rows.step != 1 {
        // SAFETY: the caller's contract.
        unsafe { scalar::pack_panel(rows, padded, out) };
        return;
    }
    for half in [0, 16] {
        for k in (0..padded).step_by(32) {
            let valid = head32(rows.len.saturating_sub(k));
            let mut block = [_mm512_setzero_si512(); 16];
            for (i, lane) in block.iter_mut().enumerate().take(rows.count.saturating_sub(half)) {
                // SAFETY: lane `half + i` is one of `count`; the mask keeps the read inside its `len`.
                *lane = unsafe {
                    _mm512_maskz_loadu_epi16(valid, rows.start[half + i].wrapping_add(k).cast())
                };
            }
            transpose16(&mut block);
            for (i, pairs) in block.iter().enumerate().take((padded - k).div_ceil(2)) {
                // SAFETY: pair row `k / 2 + i` lies below `padded / 2`, half a row of lanes is written.
                unsafe {
                    let to = out.add((k / 2 + i) * PAIR_ROW + 2 * half);
                    _mm512_storeu_si512(to.cast(), *pairs);
                }
            }
        }
    }
}

/// Right operand whose K is the vectors themselves; the contract is that of `Kernel::pack_strip`.
///
/// # Safety
/// That contract, and AVX-512 F and BW are present.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn pack_strip(rows: &Gather<bf16>, out: *mut bf16) {
    if rows.step != 1 {
        // SAFETY: the caller's contract.
        unsafe { scalar::pack_strip(rows, out) };
        return;
    }
    let valid = head32(rows.len);
    for pair in 0..LANES / 2 {
        let mut two = [_mm512_setzero_si512(); 2];
        for (i, row) in two.iter_mut().enumerate() {
            if 2 * pair + i < rows.count {
                // SAFETY: the row is one of `count`; the mask keeps the read inside its `len`.
                *row = unsafe { _mm512_maskz_loadu_epi16(valid, rows.start[2 * pair + i].cast()) };
            }
        }
        let (low, high) = interleave(two[0], two[1]);
        // SAFETY: 16 pair rows of 64 elements are writable.
        unsafe {
            let to = out.add(pair * PAIR_ROW);
            _mm512_storeu_si512(to.cast(), low);
            _mm512_storeu_si512(to.add(32).cast(), high);
        }
    }
}

/// Left operand: rows copied, K padded; the contract is that of `Kernel::pack_rows`.
///
/// # Safety
/// That contract.
pub(super) unsafe fn pack_rows(w: &Block<bf16>, k_step: usize, out: *mut bf16, out_row: usize) {
    let padded = w.cols.next_multiple_of(k_step);
    for i in 0..w.rows {
        // SAFETY: row `i` of the block is readable, `padded <= out_row` elements of its copy are writable.
        unsafe {
            let (from, to) = (w.start.offset(i as isize * w.row), out.add(i * out_row));
            if w.col == 1 {
                from.copy_to_nonoverlapping(to, w.cols);
            } else {
                for j in 0..w.cols {
                    *to.add(j) = *from.offset(j as isize * w.col);
                }
            }
            to.add(w.cols).write_bytes(0, padded - w.cols);
        }
    }
}

/// Elements that `pack_columns` prefetches ahead of each row: four cache lines.
const AHEAD: usize = 128;

/// Transposed left operand; the contract is that of `Kernel::pack_columns`.
///
/// # Safety
/// That contract, and AVX-512 F and BW are present.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn pack_columns(w: &Block<bf16>, k_step: usize, out: *mut bf16, out_row: usize) {
    let padded = w.rows.next_multiple_of(k_step);
    if w.col != 1 {
        // SAFETY: the caller's contract.
        unsafe { scalar::pack_columns(w, padded, out, out_row) };
        return;
    }
    for i in (0..padded).step_by(32) {
        let writable = head32(padded - i);
        for j in (0..w.cols).step_by(32) {
            let valid = head32(w.cols - j);
            let load = |row: usize| {
                if row >= w.rows {
                    return _mm512_setzero_si512();
                }
                let from = w.start.wrapping_offset(row as isize * w.row).wrapping_add(j);
                // More streams than the hardware follows, and the first to read this part of W.
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
                // SAFETY: `row` is one of the block's; the mask keeps the read inside its columns.
                unsafe { _mm512_maskz_loadu_epi16(valid, from.cast()) }
            };
            let mut blocks = [[_mm512_setzero_si512(); 16]; 2];
            for pair in 0..16 {
                let (low, high) = interleave(load(i + 2 * pair), load(i + 2 * pair + 1));
                blocks[0][pair] = low;
                blocks[1][pair] = high;
            }
            for (half, block) in blocks.iter_mut().enumerate() {
                transpose16(block);
                let first = j + 16 * half;
                for (f, column) in block.iter().enumerate().take(w.cols.saturating_sub(first)) {
                    let to = out.wrapping_add((first + f) * out_row + i);
                    // SAFETY: column `first + f` is one of the block's; the mask ends the write at `padded`.
                    unsafe { _mm512_mask_storeu_epi16(to.cast(), writable, *column) };
                }
            }
        }
    }
}

/// A gradient tile in both orders; the contract is that of `Kernel::store_dz`.
///
/// # Safety
/// That contract, and AVX-512 F, BW and BF16 are present.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn store_dz(
    dz: *const f32,
    classes: usize,
    k_step: usize,
    rows: *mut bf16,
    pairs: *mut bf16,
) {
    let round = |class: usize| {
        if class >= classes {
            return _mm512_setzero_si512();
        }
        // SAFETY: the class is inside the tile; `vcvtne2ps2bf16` puts its second operand in the low half.
        unsafe {
            let from = dz.add(class * LANES);
            let (low, high) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16)));
            core::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        }
    };
    for pair in 0..classes.next_multiple_of(k_step) / 2 {
        let two = [round(2 * pair), round(2 * pair + 1)];
        let (low, high) = interleave(two[0], two[1]);
        // SAFETY: both outputs hold `classes` rounded up to `k_step`, an even number, times 32 elements.
        unsafe {
            for (i, row) in two.iter().enumerate() {
                _mm512_storeu_si512(rows.add((2 * pair + i) * LANES).cast(), *row);
            }
            let to = pairs.add(pair * PAIR_ROW);
            _mm512_storeu_si512(to.cast(), low);
            _mm512_storeu_si512(to.add(32).cast(), high);
        }
    }
}

/// The lowest `n` bits, all 32 from there on.
fn head32(n: usize) -> u32 {
    if n >= 32 { u32::MAX } else { (1 << n) - 1 }
}

/// `x0 y0 x1 y1 ...` of two rows of 32 bf16: the first 16 pairs and the last 16.
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(x: __m512i, y: __m512i) -> (__m512i, __m512i) {
    const fn order(first: u16) -> [u16; 32] {
        let mut index = [0; 32];
        let mut i = 0;
        while i < 32 {
            index[i] = first + i as u16 / 2 + (i as u16 % 2) * 32;
            i += 1;
        }
        index
    }
    const LOW: [u16; 32] = order(0);
    const HIGH: [u16; 32] = order(16);
    // SAFETY: each table is 64 bytes.
    let (low, high) = unsafe {
        (_mm512_loadu_si512(LOW.as_ptr().cast()), _mm512_loadu_si512(HIGH.as_ptr().cast()))
    };
    (_mm512_permutex2var_epi16(x, low, y), _mm512_permutex2var_epi16(x, high, y))
}

/// Transposes 16 x 16 lanes of 32 bits: two rounds inside 128-bit quarters, two across them.
#[target_feature(enable = "avx512f")]
fn transpose16(r: &mut [__m512i; 16]) {
    let mut t = [_mm512_setzero_si512(); 16];
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for i in 0..4 {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for i in 0..4 {
        t[i] = _mm512_shuffle_i32x4::<0x88>(r[i], r[4 + i]);
        t[4 + i] = _mm512_shuffle_i32x4::<0xdd>(r[i], r[4 + i]);
        t[8 + i] = _mm512_shuffle_i32x4::<0x88>(r[8 + i], r[12 + i]);
        t[12 + i] = _mm512_shuffle_i32x4::<0xdd>(r[8 + i], r[12 + i]);
    }
    for i in 0..4 {
        r[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[8 + i]);
        r[8 + i] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[8 + i]);
        r[4 + i] = _mm512_shuffle_i32x4::<0x88>(t[4 + i], t[12 + i]);
        r[12 + i] = _mm512_shuffle_i32x4::<0xdd>(t[4 + i], t[12 + i]);
    }
}

/// The same layouts one element at a time, for any step.
mod scalar {
    use super::{Block, Gather, LANES, PAIR_ROW, bf16};

    /// # Safety
    /// As [`super::pack_panel`].
    pub(super) unsafe fn pack_panel(rows: &Gather<bf16>, padded: usize, out: *mut bf16) {
        // SAFETY: reads stay below `count` and `len`, writes below `padded * 32`.
        unsafe {
            out.write_bytes(0, padded.next_multiple_of(2) * LANES);
            for (lane, &start) in rows.start.iter().enumerate().take(rows.count) {
                for k in 0..rows.len {
                    let x = *start.offset(k as isize * rows.step);
                    *out.add(k / 2 * PAIR_ROW + 2 * lane + k % 2) = x;
                }
            }
        }
    }

    /// # Safety
    /// As [`super::pack_strip`].
    pub(super) unsafe fn pack_strip(rows: &Gather<bf16>, out: *mut bf16) {
        // SAFETY: reads stay below `count` and `len`, writes below `32 * 32`.
        unsafe {
            out.write_bytes(0, LANES * LANES);
            for (r, &start) in rows.start.iter().enumerate().take(rows.count) {
                for l in 0..rows.len {
                    let x = *start.offset(l as isize * rows.step);
                    *out.add(r / 2 * PAIR_ROW + 2 * l + r % 2) = x;
                }
            }
        }
    }

    /// # Safety
    /// As [`super::pack_columns`].
    pub(super) unsafe fn pack_columns(
        w: &Block<bf16>,
        padded: usize,
        out: *mut bf16,
        out_row: usize,
    ) {
        for j in 0..w.cols {
            // SAFETY: reads stay inside the block, writes inside `padded` elements of row `j`.
            unsafe {
                let (from, to) = (w.start.offset(j as isize * w.col), out.add(j * out_row));
                for i in 0..w.rows {
                    *to.add(i) = *from.offset(i as isize * w.row);
                }
                to.add(w.rows).write_bytes(0, padded - w.rows);
            }
        }
    }
}
