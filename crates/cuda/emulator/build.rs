//! Compiles the kernel sources with the host's C++ compiler, in which `dev::` is the emulator.

fn main() {
    println!("cargo:rerun-if-changed=../kernels");
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .warnings(false)
        .define("EMU", None)
        .include("../kernels")
        .file("../kernels/emu/entry.cpp")
        .file("../kernels/emu/known.cpp")
        .compile("cuda_emulator");
}
