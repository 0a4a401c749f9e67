//! What the code after an address does to the upper halves of zmm0 to zmm15, found by walking it.

use iced_x86::FlowControl;

use crate::code::{self, Entry};

/// What can happen to bits 511:256 of the registers after an address, a bit per register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Future {
    /// Those that are written on every way before anything reads them: what they hold cannot be observed.
    pub dead: u16,
    /// Those that the processor may clear before it comes to a fault.
    pub cleared: u16,
}

/// Marks a future that is known.
const KNOWN: u64 = 1 << 32;

impl Future {
    pub(crate) fn to_bits(self) -> u64 {
        KNOWN | u64::from(self.dead) << 16 | u64::from(self.cleared)
    }

    pub(crate) fn from_bits(bits: u64) -> Option<Self> {
        (bits & KNOWN != 0).then_some(Self { dead: (bits >> 16) as u16, cleared: bits as u16 })
    }

    /// Walks the code from an address on.
    pub fn of(address: u64) -> Self {
        let live = Walk::new().run(address, |entry| (entry.uppers.read, entry.uppers.written));
        // A fault ends what the processor does by itself.
        let cleared = Walk::new()
            .run(address, |entry| if entry.faults { (0, u16::MAX) } else { (entry.uppers.written, 0) });
        Self { dead: !live, cleared }
    }
}

/// Instructions that a walk visits, at most.
const REACH: usize = 4096;

/// A walk along all ways from an address: which registers arrive where, without having been decided on before.
struct Walk {
    /// Open addressing by address; zero is free.
    addresses: [u64; 2 * REACH],
    /// Registers that have arrived there.
    arrived: [u16; 2 * REACH],
    visited: usize,
    queue: [u16; REACH],
    queued: usize,
}

impl Walk {
    // A signal handler must not allocate.
    #[allow(clippy::large_stack_arrays)]
    fn new() -> Self {
        Self { addresses: [0; 2 * REACH], arrived: [0; 2 * REACH], visited: 0, queue: [0; REACH], queued: 0 }
    }

    /// The registers on which some way finds what `finds` says of an instruction, or which go where code cannot be followed.
    ///
    /// `finds` gives the registers found, and those that are decided on although they are not.
    fn run(mut self, start: u64, finds: impl Fn(&Entry) -> (u16, u16)) -> u16 {
        let mut found = 0;
        if !self.arrive(start, u16::MAX) {
            return u16::MAX;
        }
        while self.queued > 0 {
            self.queued -= 1;
            let place = self.queue[self.queued] as usize;
            let (entry, open) = (code::at(self.addresses[place]), self.arrived[place]);
            let (here, decided) = finds(&entry);
            found |= here & open;
            let open = open & !here & !decided;
            if open == 0 {
                continue;
            }
            let (next, target) = (entry.instruction.next_ip(), entry.instruction.near_branch_target());
            let followed = match entry.instruction.flow_control() {
                FlowControl::Exception => true,
                FlowControl::Next => self.arrive(next, open),
                FlowControl::UnconditionalBranch => self.arrive(target, open),
                FlowControl::ConditionalBranch => self.arrive(next, open) && self.arrive(target, open),
                _ => false,
            };
            if !followed {
                found |= open;
            }
        }
        found
    }

    /// Notes registers that arrive at an address, and queues it if they are new there; false where the walk is full.
    fn arrive(&mut self, address: u64, open: u16) -> bool {
        let mut place = (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % (2 * REACH);
        while self.addresses[place] != address {
            if self.addresses[place] == 0 {
                if self.visited == REACH {
                    return false;
                }
                self.visited += 1;
                self.addresses[place] = address;
                break;
            }
            place = (place + 1) % (2 * REACH);
        }
        if open & !self.arrived[place] == 0 {
            return true;
        }
        self.arrived[place] |= open;
        if self.queued == REACH {
            return false;
        }
        self.queue[self.queued] = place as u16;
        self.queued += 1;
        true
    }
}
