//! What happens when the library is loaded, and when the process ends.
#![allow(unsafe_code)]

use crate::trap;

/// Variable that asks for counts at the end.
const COUNTS: &str = "MICROTOME_EMULATED_COUNTS";

extern "C" fn load() {
    trap::install();
    if std::env::var_os(COUNTS).is_some() {
        // SAFETY: `unload` has the type of an exit handler.
        unsafe { libc::atexit(unload) };
    }
}

extern "C" fn unload() {
    let [faults, steps, executed] = trap::counts();
    let line =
        format!("emulated AVX-512: {executed} instructions in {faults} faults, {steps} single steps\n");
    // SAFETY: `line` is so many readable bytes.
    unsafe { libc::write(2, line.as_ptr().cast(), line.len()) };
}

// SAFETY: the loader calls what is in this section, once, before `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static LOAD: extern "C" fn() = load;
