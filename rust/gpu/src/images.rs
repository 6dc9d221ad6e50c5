//! x
#![allow(dead_code)]
struct Image { arch: Arch, offset: usize, packed: usize, size: usize, kernels: &'static [&'static str], tile: Option<Tile> }
enum Arch { Sm80, Sm86, Sm89, Sm90a, Sm120, Compute80 }
struct Tile { name: &'static str, m: u32, n: u32, cluster: u32, threads: u32, shared: u32 }
include!(concat!(env!("OUT_DIR"), "/images.rs"));
