//! CRC32C of a block, as fast as it can be read from memory.
//!
//! The processor's instruction takes eight bytes in one cycle but answers after three, so a block is cut into three lanes
//! whose remainders are joined at the end: with `P` the polynomial and `|B|` the length of `B` in bits,
//! `crc(AB) = crc(A) x^|B| + crc(B) mod P`. Interleaving pieces of a few hundred bytes, as is usual, keeps the unit busy
//! as long as the data is in cache; from memory it starts a new stream every piece, and no prefetcher follows. Here a lane
//! is a third of a mebibyte. Gopal et al. 2011, "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction".

#![allow(unsafe_code)] // one dispatch by instruction set

/// CRC32C of `bytes`, as in RFC 3720.
pub fn crc32c(bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if let Some((lanes, rest)) = bytes.split_first_chunk::<{ 3 * x86::LANE }>()
        && std::arch::is_x86_feature_detected!("sse4.2")
    {
        // SAFETY: the processor has SSE 4.2.
        return crc32c::crc32c_append(unsafe { x86::three_lanes(lanes) }, rest);
    }
    crc32c::crc32c(bytes)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::_mm_crc32_u64;

    use crate::kernels::prefetch::fetch;

    /// Bytes of a cache line.
    const LINE: usize = 64;
    /// Bytes per lane: as many lines as three times fit into a mebibyte.
    pub const LANE: usize = (1 << 20) / 3 / LINE * LINE;
    /// Bytes that each lane is fetched ahead.
    const AHEAD: usize = 1024;
    /// The polynomial, its lowest bit first, without its highest term.
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    /// x^(8 LANE) mod P: what a remainder is multiplied by when a lane follows.
    const ONE_LANE: u32 = power(8 * LANE as u64);

    /// `a b mod P`.
    const fn product(a: u32, mut b: u32) -> u32 {
        let (mut sum, mut bit) = (0, 1 << 31);
        while bit != 0 {
            if a & bit != 0 {
                sum ^= b;
            }
            bit >>= 1;
            b = if b & 1 == 0 { b >> 1 } else { (b >> 1) ^ POLYNOMIAL };
        }
        sum
    }

    /// `x^n mod P`.
    const fn power(mut n: u64) -> u32 {
        let (mut result, mut square) = (1 << 31, 1 << 30);
        while n > 0 {
            if n & 1 == 1 {
                result = product(result, square);
            }
            square = product(square, square);
            n >>= 1;
        }
        result
    }

    /// CRC32C of three lanes side by side.
    #[target_feature(enable = "sse4.2")]
    pub fn three_lanes(bytes: &[u8; 3 * LANE]) -> u32 {
        let lane = |i: usize| bytes[i * LANE..(i + 1) * LANE].as_chunks::<LINE>().0;
        // A remainder starts from all ones and is inverted at the end: for the whole, not for each lane.
        let mut crc = [u64::from(u32::MAX), 0, 0];
        for ((a, b), c) in lane(0).iter().zip(lane(1)).zip(lane(2)) {
            for line in [a, b, c] {
                fetch(line, AHEAD);
            }
            for i in 0..LINE / 8 {
                crc[0] = _mm_crc32_u64(crc[0], u64::from_le_bytes(a.as_chunks().0[i]));
                crc[1] = _mm_crc32_u64(crc[1], u64::from_le_bytes(b.as_chunks().0[i]));
                crc[2] = _mm_crc32_u64(crc[2], u64::from_le_bytes(c.as_chunks().0[i]));
            }
        }
        // The instruction leaves the upper half zero.
        let [a, b, c] = crc.map(|lane| lane as u32);
        !(product(ONE_LANE, product(ONE_LANE, a) ^ b) ^ c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_bitwise_definition() {
        let bytes: Vec<u8> = (0..4099_u32).map(|i| ((i * i) >> 3) as u8).collect();
        let mut crc = u32::MAX;
        for byte in &bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 0 { crc >> 1 } else { (crc >> 1) ^ 0x82F6_3B78 };
            }
        }
        assert_eq!(crc32c(&bytes), !crc);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn lanes_join_at_every_length_and_alignment() {
        let bytes: Vec<u8> =
            (0..(2_u64 << 20)).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect();
        for len in [0, 1, 7, 64, 1_048_511, 1_048_512, 1_048_513, 1 << 20, (1 << 20) + 5] {
            for start in [0, 1, 63] {
                let part = &bytes[start..start + len];
                assert_eq!(crc32c(part), ::crc32c::crc32c(part), "{len} bytes from {start}");
            }
        }
    }

    #[test]
    fn a_flipped_bit_in_any_lane_is_seen() {
        let mut bytes = vec![0x5a; 1 << 20];
        let sound = crc32c(&bytes);
        for at in [0, 1000, 349_503, 349_504, 699_008, 1_048_511, (1 << 20) - 1] {
            bytes[at] ^= 1;
            assert_ne!(crc32c(&bytes), sound, "byte {at}");
            bytes[at] ^= 1;
        }
    }
}
