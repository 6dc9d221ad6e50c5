//! Parameters of the products: `gemm_sm90.cu`, `gemm_sm80.cu`, `gemm_plain.cu`.

use std::mem::size_of;

/// One product on tensor cores.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Gemm {
    pub a: usize,
    pub b: usize,
    pub d: usize,
    pub lda: i64,
    pub ldb: i64,
    pub ldd: i64,
    pub count: usize,
    pub alpha: usize,
    pub reference: usize,
    pub target: usize,
    pub coef: usize,
    pub bias: usize,
    pub part: usize,
    pub part_plane: i64,
    pub gate: usize,
    pub onehot_w: usize,
    pub onehot_g: usize,
    pub onehot_ld: i64,
    pub onehot_start: usize,
    pub onehot_rows: usize,
    pub onehot_sums: usize,
    pub scale_at: usize,
    pub columns: usize,
    pub dots: usize,
    pub target_z: usize,
    pub in_place: usize,
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub ld_row: i32,
    pub col0: i32,
    pub group: i32,
    pub accumulate: i32,
    pub count_is_k: i32,
    pub scale: f32,
    pub softcap: f32,
    pub shift: f32,
    pub reserved: i32,
    pub slices: i32,
    pub slice_rows: i32,
    pub early: i32,
    pub head: i32,
}
const _: () = assert!(size_of::<Gemm>() == 272);

/// `plain_*`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Plain {
    pub a: usize,
    pub b: usize,
    pub d: usize,
    pub a_m: i64,
    pub a_k: i64,
    pub b_n: i64,
    pub b_k: i64,
    pub d_m: i64,
    pub d_n: i64,
    pub count: usize,
    pub alpha: usize,
    pub bias: usize,
    pub scale_at: usize,
    pub scale: f64,
    pub softcap: f64,
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub count_is_k: i32,
    pub accumulate: i32,
    pub logits: i32,
}
const _: () = assert!(size_of::<Plain>() == 144);
