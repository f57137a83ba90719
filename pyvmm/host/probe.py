# probe.py: all that pyvmm wants to know of a host: one row a feature. Costs and remedies are for people.
"""The literal table of probes, and the questions to this host: `has`, `finding`, `findings`, `without`."""

from __future__ import annotations

from functools import partial

from pyvmm.host import trials_dirty, trials_kvm, trials_memory, trials_uffd
from pyvmm.host.feature import Feature
from pyvmm.host.prober import Probe, Prober
from pyvmm.host.settings import KSM, THP

_HARDWARE = "needs a host with VT-x or SVM; where it is a VM itself, 'kvm_intel nested=1' (kvm_amd) one level up"
_PAGING = "needs two-dimensional paging (EPT, NPT): 'sudo modprobe kvm_intel ept=1' or 'kvm_amd npt=1'"
_NEEDS_UFFD = "needs a kernel >= {} with CONFIG_USERFAULTFD"

PROBES = (
    Probe(
        Feature.KVM, "KVM", "/dev/kvm", trials_kvm.opens,
        cost="no guest can run",
        remedy="load KVM with 'sudo modprobe kvm_intel' or 'sudo modprobe kvm_amd'",
    ),
    Probe(
        Feature.RING0_NATIVE, "KVM", "ring 0", partial(trials_kvm.speed, 0),
        requires=(Feature.KVM,), only_slower=True,
        cost="guest kernels (Linux) run hundreds of times slower; pyvmm's own guests work in ring 3",
        remedy=_HARDWARE,
    ),
    Probe(
        Feature.RING3_NATIVE, "KVM", "ring 3", partial(trials_kvm.speed, 3),
        requires=(Feature.KVM,), only_slower=True,
        cost="every guest runs hundreds of times slower",
        remedy=_HARDWARE,
    ),
    Probe(
        Feature.FAST_EXITS, "KVM", "cost of an exit", trials_kvm.exit_cost,
        requires=(Feature.KVM,), only_slower=True,
        cost="serial output, device access and faults are 10 times slower; guests that work in memory are not",
        remedy=_HARDWARE,
    ),
    Probe(
        Feature.STATS_FD, "KVM", "statistics", trials_kvm.stats_fd,
        requires=(Feature.KVM,),
        cost="no proof of mapping sizes: 'pyvmm stats' and the live map lack KVM's counts",
        remedy="needs a kernel >= 5.14",
    ),
    Probe(
        Feature.LARGE_MAPPINGS, "KVM", "2 MiB mappings", trials_kvm.large_mappings,
        requires=(Feature.KVM, Feature.STATS_FD, Feature.THP), only_slower=True,
        cost="guests run with 4 KiB mappings: more TLB misses, and splitting and merging change nothing",
        remedy=_PAGING,
    ),
    Probe(
        Feature.DIRTY_BITMAP, "KVM", "dirty bitmap", trials_dirty.bitmap,
        requires=(Feature.KVM,),
        cost="no write tracing by KVM: no pre-copy migration, no incremental snapshot",
        remedy="needs a KVM that write-protects guest pages; every kernel's own does",
    ),
    Probe(
        Feature.MANUAL_PROTECT, "KVM", "manual protection", trials_dirty.manual_protect,
        requires=(Feature.KVM,), only_slower=True,
        cost="each look at the dirty log protects all of a slot anew: longer stalls in pre-copy migration",
        remedy="needs a kernel >= 5.1",
    ),
    Probe(
        Feature.INITIALLY_SET, "KVM", "log initially set", trials_dirty.initially_set,
        requires=(Feature.KVM,), only_slower=True,
        cost="switching the dirty log on splits all large mappings at once: a stall at the start of migration",
        remedy="needs a kernel >= 5.7",
    ),
    Probe(
        Feature.DIRTY_RING, "KVM", "dirty ring", trials_dirty.ring,
        requires=(Feature.KVM,), only_slower=True,
        cost="no dirty ring: tracing reads whole bitmaps, slower for large guests that write little",
        remedy="needs a kernel >= 5.11 on x86",
    ),
    Probe(
        Feature.PRE_FAULT, "KVM", "pre-fault", trials_kvm.pre_fault,
        requires=(Feature.KVM, Feature.STATS_FD), only_slower=True,
        cost="the guest takes one fault for each block that it touches first, after start and restore",
        remedy="needs a kernel >= 6.11 and two-dimensional paging (EPT, NPT)",
    ),
    Probe(
        Feature.SINGLE_STEP_RING0, "KVM", "single-step, ring 0", partial(trials_kvm.single_step, 0),
        requires=(Feature.KVM,),
        cost="the debugger cannot step through kernel code of guests",
        remedy=_HARDWARE,
    ),
    Probe(
        Feature.SINGLE_STEP_RING3, "KVM", "single-step, ring 3", partial(trials_kvm.single_step, 3),
        requires=(Feature.KVM,),
        cost="the debugger steps and breaks in ring 0 only, not in the work loops of pyvmm's guests",
        remedy=_HARDWARE,
    ),
    Probe(
        Feature.TSC_STABLE, "KVM", "TSC", trials_kvm.tsc_stable,
        requires=(Feature.KVM,), only_slower=True,
        cost="guests read time with an exit or with jumps between CPUs; times measured in guests are rough",
        remedy="needs an invariant TSC; boot with 'tsc=reliable' only if the firmware keeps the cores in step",
    ),
    Probe(
        Feature.TSC_SCALING, "KVM", "TSC scaling", trials_kvm.tsc_scaling,
        requires=(Feature.KVM,),
        cost="a guest from a host with another TSC rate finds its clock fast or slow after migration or restore",
        remedy="needs a CPU with TSC scaling, and where the host is a VM itself, a hypervisor that passes it on",
    ),
    Probe(
        Feature.THP, "memory", "large pages (THP)", trials_memory.thp,
        only_slower=True,
        cost="guest memory is in 4 KiB pages: start, migration and page moves are several times slower",
        remedy=f"echo madvise | sudo tee {THP}/enabled",
    ),
    Probe(
        Feature.THP_SHMEM, "memory", "large pages in memfd", trials_memory.thp_shmem,
        only_slower=True,
        cost="shared guest memory starts in 4 KiB pages, until MADV_COLLAPSE makes them large",
        remedy=f"echo advise | sudo tee {THP}/shmem_enabled",
    ),
    Probe(
        Feature.COLLAPSE, "memory", "MADV_COLLAPSE", trials_memory.collapse,
        only_slower=True,
        cost="split blocks become large again only when khugepaged comes by, minutes later",
        remedy="needs a kernel >= 6.1 with CONFIG_TRANSPARENT_HUGEPAGE",
    ),
    Probe(
        Feature.COLLAPSE_SHMEM, "memory", "MADV_COLLAPSE, memfd", trials_memory.collapse_shmem,
        only_slower=True,
        cost="split blocks of shared guest memory stay split",
        remedy="needs a kernel >= 6.1 with CONFIG_TRANSPARENT_HUGEPAGE",
    ),
    Probe(
        Feature.HUGETLB, "memory", "reserved huge pages", trials_memory.hugetlb,
        cost="'--hugetlb' cannot be used; THP serve as well for nearly all",
        remedy="sudo sysctl vm.nr_hugepages=128 (256 MiB, which nothing else can use then)",
    ),
    Probe(
        Feature.KSM, "memory", "merging by the kernel", trials_memory.ksm,
        cost="equal pages are counted, and not shared ('pyvmm pages --sharing'); pages of zeros are dropped",
        remedy=f"echo 1 | sudo tee {KSM}/run",
    ),
    Probe(
        Feature.UFFD, "userfaultfd", "userfaultfd", trials_uffd.opens,
        cost="no lazy restore, no post-copy migration, no swapping, no access sampling",
        remedy=_NEEDS_UFFD.format("4.3"),
    ),
    Probe(
        Feature.UFFD_MISSING, "userfaultfd", "absent pages", trials_uffd.missing,
        requires=(Feature.UFFD,),
        cost="no lazy restore, no post-copy migration, no swapping",
        remedy=_NEEDS_UFFD.format("4.3"),
    ),
    Probe(
        Feature.UFFD_GUEST, "userfaultfd", "faults of guests", trials_uffd.guest,
        requires=(Feature.KVM, Feature.UFFD),
        cost="no lazy restore, no post-copy migration, no swapping of a running guest",
        remedy="needs a userfaultfd that is not limited to user mode, and KVM's own guest memory",
    ),
    Probe(
        Feature.UFFD_WP, "userfaultfd", "write protection", trials_uffd.write_protect,
        requires=(Feature.UFFD,),
        cost="no live snapshot of a running guest",
        remedy=_NEEDS_UFFD.format("5.7"),
    ),
    Probe(
        Feature.UFFD_WP_LARGE, "userfaultfd", "... of a 2 MiB page", trials_uffd.write_protect_large,
        requires=(Feature.UFFD, Feature.THP), only_slower=True,
        cost="a live snapshot splits the guest's large pages",
        remedy=_NEEDS_UFFD.format("5.7"),
    ),
    Probe(
        Feature.UFFD_WP_ASYNC, "userfaultfd", "... without answers", trials_uffd.write_protect_async,
        requires=(Feature.UFFD,), only_slower=True,
        cost="writes to our own side of memory are traced by faults, each served by a thread",
        remedy=_NEEDS_UFFD.format("6.7"),
    ),
    Probe(
        Feature.UFFD_MINOR, "userfaultfd", "minor faults, memfd", trials_uffd.minor,
        requires=(Feature.UFFD,),
        cost="no fault handling for shared guest memory whose pages are already there",
        remedy=_NEEDS_UFFD.format("5.14"),
    ),
    Probe(
        Feature.UFFD_MOVE, "userfaultfd", "moving a page", trials_uffd.move,
        requires=(Feature.UFFD,), only_slower=True,
        cost="pages are copied out of a guest and back instead of moved: a large page takes 2 ms, not 0.03",
        remedy=_NEEDS_UFFD.format("6.8"),
    ),
    Probe(
        Feature.UFFD_MOVE_LARGE, "userfaultfd", "moving 2 MiB", trials_uffd.move_large,
        requires=(Feature.UFFD, Feature.THP), only_slower=True,
        cost="whole blocks move as 512 pages: sampling and eviction are slower and leave small pages",
        remedy=_NEEDS_UFFD.format("6.8"),
    ),
)  # fmt: skip

_host = Prober(PROBES)
has = _host.has
finding = _host.finding
findings = _host.findings
without = _host.without
