// SPDX-License-Identifier: GPL-2.0-or-later
//! The operations that are measured, and how a list of them is written.

/// Phases of [`Op::Phases`] and [`Op::PhasesShort`].
pub const PHASES: u32 = 4;
/// Hypercalls in a phase of [`Op::Phases`].
pub const PHASE: u32 = 256;
/// Hypercalls in a phase of [`Op::PhasesShort`].
pub const SHORT_PHASE: u32 = 32;

/// One operation. Its depth is the level that executes it, which for some is the payload's child.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Op {
    /// The payload's child makes a VMCALL and is resumed past it, the way a small hypervisor does it:
    /// HOST_RSP and HOST_RIP are written before each VMRESUME. No EPT, no VPID.
    Hypercall,
    /// The same with a host state that stays: nothing but GUEST_RIP is read and written.
    HypercallLean,
    /// The lean one, with EPT, VPID and unrestricted guest, as KVM runs its guests.
    HypercallEpt,
    /// VMCALL to the payload's own parent, which answers in its kernel.
    KvmHypercall,
    /// CPUID, answered by the parent's kernel.
    Cpuid,
    /// OUT to a port that the parent's VMM handles in user space.
    Pio,
    /// VMREAD of GUEST_RIP, which stock KVM shadows.
    VmreadShadowed,
    /// VMREAD of GUEST_ES_SELECTOR, which stock KVM does not shadow.
    VmreadUnshadowed,
    /// VMWRITE of GUEST_ES_SELECTOR.
    VmwriteUnshadowed,
    /// VMPTRLD of the VMCS that is already current.
    VmptrldSame,
    /// VMPTRLD of the other one of two VMCSs, both launched.
    VmptrldSwitch,
    /// VMCLEAR of the current VMCS and VMPTRLD of it again.
    VmclearVmptrld,
    /// [`PHASES`] phases of [`PHASE`] lean hypercalls each, between which the payload reads and writes fields that stock KVM does
    /// not shadow, in each phase others. All of it counts, so what learning costs does, too.
    Phases,
    /// The same with phases of [`SHORT_PHASE`] hypercalls.
    PhasesShort,
    /// The child's first touch of pages that the payload's EPT maps and L0 has backed.
    TouchWarm,
    /// The same where the payload's EPT has pages of 2 MiB, and L0 small ones.
    TouchLarge,
    /// The child's first touch of pages that the payload's EPT does not map yet; the payload maps one
    /// on each EPT violation.
    TouchReflected,
    /// The payload's first touch of pages that its VMM has populated.
    TouchUnmapped,
    /// The payload's first touch of pages that its VMM has not backed.
    TouchCold,
    /// A Linux guest from its first instruction to its init. No payload does it; its VMM measures it.
    Boot,
}

impl Op {
    /// Every operation, in the order of a report.
    pub const EVERY: [Op; 20] = [
        Op::Hypercall,
        Op::HypercallLean,
        Op::HypercallEpt,
        Op::KvmHypercall,
        Op::Cpuid,
        Op::Pio,
        Op::VmreadShadowed,
        Op::VmreadUnshadowed,
        Op::VmwriteUnshadowed,
        Op::VmptrldSame,
        Op::VmptrldSwitch,
        Op::VmclearVmptrld,
        Op::Phases,
        Op::PhasesShort,
        Op::TouchWarm,
        Op::TouchLarge,
        Op::TouchReflected,
        Op::TouchUnmapped,
        Op::TouchCold,
        Op::Boot,
    ];

    /// The name used in results and on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Hypercall => "hypercall",
            Op::HypercallLean => "hypercall_lean",
            Op::HypercallEpt => "hypercall_ept",
            Op::KvmHypercall => "kvm_hypercall",
            Op::Cpuid => "cpuid",
            Op::Pio => "pio",
            Op::VmreadShadowed => "vmread_shadowed",
            Op::VmreadUnshadowed => "vmread_unshadowed",
            Op::VmwriteUnshadowed => "vmwrite_unshadowed",
            Op::VmptrldSame => "vmptrld_same",
            Op::VmptrldSwitch => "vmptrld_switch",
            Op::VmclearVmptrld => "vmclear_vmptrld",
            Op::Phases => "phases",
            Op::PhasesShort => "phases_short",
            Op::TouchWarm => "touch_warm",
            Op::TouchLarge => "touch_large",
            Op::TouchReflected => "touch_reflected",
            Op::TouchUnmapped => "touch_unmapped",
            Op::TouchCold => "touch_cold",
            Op::Boot => "boot",
        }
    }

    /// The operation of that name.
    pub fn from_name(name: &str) -> Option<Op> {
        Op::EVERY.into_iter().find(|op| op.name() == name)
    }

    /// The level that executes it when the payload is at `level`.
    pub const fn depth(self, level: u32) -> u32 {
        level + self.in_child() as u32
    }

    /// Does the payload's child execute it?
    pub const fn in_child(self) -> bool {
        matches!(
            self,
            Op::Hypercall
                | Op::HypercallLean
                | Op::HypercallEpt
                | Op::Phases
                | Op::PhasesShort
                | Op::TouchWarm
                | Op::TouchLarge
                | Op::TouchReflected
        )
    }

    /// Hypercalls in a phase of the operations that have phases.
    pub const fn phase(self) -> Option<u32> {
        match self {
            Op::Phases => Some(PHASE),
            Op::PhasesShort => Some(SHORT_PHASE),
            _ => None,
        }
    }

    /// Is it counted per page over a pass, rather than one by one?
    pub const fn is_touch(self) -> bool {
        matches!(
            self,
            Op::TouchWarm | Op::TouchLarge | Op::TouchReflected | Op::TouchUnmapped | Op::TouchCold
        )
    }
}

/// The order in which a touch operation visits its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pattern {
    /// Up, one page after the other.
    Sequential,
    /// Each page once, in an order drawn from a fixed seed.
    Random,
    /// Every 16th page, then every 16th from the next one, and so on.
    Strided,
    /// Every 8th page of a region as much larger, and none between: whoever backs pages that nobody
    /// touches shows in the host's resident memory.
    Sparse,
}

impl Pattern {
    /// Every pattern.
    pub const EVERY: [Pattern; 4] = [
        Pattern::Sequential,
        Pattern::Random,
        Pattern::Strided,
        Pattern::Sparse,
    ];

    /// Pages between two neighbours of the sparse pattern.
    pub const SPARSE: u32 = 8;

    /// Pages of the region that `pages` touched ones lie in.
    pub const fn span(self, pages: u32) -> u32 {
        match self {
            Pattern::Sparse => pages.saturating_mul(Self::SPARSE),
            _ => pages,
        }
    }

    /// The name used in results and on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Pattern::Sequential => "sequential",
            Pattern::Random => "random",
            Pattern::Strided => "strided",
            Pattern::Sparse => "sparse",
        }
    }

    /// The pattern of that name.
    pub fn from_name(name: &str) -> Option<Pattern> {
        Pattern::EVERY
            .into_iter()
            .find(|pattern| pattern.name() == name)
    }
}

/// An operation and how much of it: `name:samples`, or for touch operations
/// `name/pattern:pages x passes` without the blanks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpSpec {
    /// What.
    pub op: Op,
    /// In which order; `None` where there is none.
    pub pattern: Option<Pattern>,
    /// Samples, or pages for a touch operation.
    pub count: u32,
    /// How often the pages are visited anew; 1 for the others.
    pub passes: u32,
}

impl OpSpec {
    /// Reads one item of a list; `None` if it is not one.
    pub fn parse(item: &str) -> Option<OpSpec> {
        let (what, count) = item.split_once(':')?;
        let (name, pattern) = match what.split_once('/') {
            Some((name, pattern)) => (name, Some(Pattern::from_name(pattern)?)),
            None => (what, None),
        };
        let (count, passes) = match count.split_once('x') {
            Some((count, passes)) => (count, passes.parse().ok()?),
            None => (count, 1),
        };
        let spec = OpSpec {
            op: Op::from_name(name)?,
            pattern,
            count: count.parse().ok()?,
            passes,
        };
        let fits = spec.op != Op::Boot
            && spec.count > 0
            && spec.passes > 0
            && spec.op.is_touch() == spec.pattern.is_some()
            && (spec.op.is_touch() || spec.passes == 1);
        fits.then_some(spec)
    }
}

impl core::fmt::Display for OpSpec {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.op.name())?;
        match self.pattern {
            Some(pattern) => write!(f, "/{}:{}x{}", pattern.name(), self.count, self.passes),
            None => write!(f, ":{}", self.count),
        }
    }
}

/// Reads the value of the argument `ops`: items separated by commas. Each is `Err` with its text
/// if it cannot be read, so that the caller can name it.
pub fn parse_list(list: &str) -> impl Iterator<Item = Result<OpSpec, &str>> {
    list.split(',')
        .filter(|item| !item.is_empty())
        .map(|item| OpSpec::parse(item).ok_or(item))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn a_list_is_read_back() {
        let list = "hypercall:60,touch_cold/random:2048x3";
        let specs: std::vec::Vec<_> = parse_list(list).map(Result::unwrap).collect();
        assert_eq!(specs[0].op, Op::Hypercall);
        assert_eq!(specs[1].pattern, Some(Pattern::Random));
        assert_eq!((specs[1].count, specs[1].passes), (2048, 3));
        let again: std::vec::Vec<_> = specs.iter().map(|spec| spec.to_string()).collect();
        assert_eq!(again.join(","), list);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for bad in [
            "hypercall",
            "hypercall:0",
            "hyper:3",
            "cpuid/random:3",
            "touch_cold:12x2",
            "cpuid:3x2",
            "touch_cold/up:3x1",
            "cpuid:-1",
            "boot:1",
        ] {
            assert_eq!(parse_list(bad).next(), Some(Err(bad)));
        }
        assert_eq!(parse_list("").next(), None);
    }

    #[test]
    fn names_are_unique() {
        for op in Op::EVERY {
            assert_eq!(Op::from_name(op.name()), Some(op));
        }
    }
}
