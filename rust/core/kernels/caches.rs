//! How much a cache of this processor holds: blocks are sized by it, results never depend on it.

use std::sync::OnceLock;

/// Where the processor does not say.
const USUAL: usize = 512 << 10;
/// What no second-level cache is smaller or larger than; a virtual machine may say anything.
const SENSIBLE: std::ops::RangeInclusive<usize> = (128 << 10)..=(8 << 20);

/// Bytes of the second-level cache of a core.
pub fn second_level_bytes() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| asked().filter(|bytes| SENSIBLE.contains(bytes)).unwrap_or(USUAL))
}

#[cfg(target_arch = "x86_64")]
fn asked() -> Option<usize> {
    use super::cpuid::cpuid;
    /// The leaves that describe caches in the same words: of Intel, and of AMD.
    const LEAVES: [u32; 2] = [4, 0x8000_001d];
    /// More caches than any core has.
    const MOST: u32 = 8;
    let caches = LEAVES.into_iter().flat_map(|leaf| (0..MOST).filter_map(move |number| cpuid(leaf, number)));
    // Kind 0 is none, 2 holds instructions.
    let mut data = caches.filter(|cache| !matches!(cache.eax & 31, 0 | 2) && cache.eax >> 5 & 7 == 2);
    let field = |word: u32, start: u32, bits: u32| ((word >> start & ((1 << bits) - 1)) + 1) as usize;
    data.next().map(|cache| {
        let (ways, parts, line) =
            (field(cache.ebx, 22, 10), field(cache.ebx, 12, 10), field(cache.ebx, 0, 12));
        [ways, parts, line].into_iter().fold((cache.ecx as usize).saturating_add(1), usize::saturating_mul)
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn asked() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_level_cache_is_one_that_the_system_knows() {
        assert!(SENSIBLE.contains(&second_level_bytes()));
        // Cores of one processor may differ.
        let size = |core: usize| {
            let path = format!("/sys/devices/system/cpu/cpu{core}/cache/index2/size");
            let text = std::fs::read_to_string(path).ok()?;
            text.trim().strip_suffix('K')?.parse::<usize>().ok().map(|kib| kib << 10)
        };
        let known: Vec<usize> = (0..64).map_while(size).filter(|bytes| SENSIBLE.contains(bytes)).collect();
        assert!(known.is_empty() || asked().is_none() || known.contains(&second_level_bytes()), "{known:?}");
    }
}
