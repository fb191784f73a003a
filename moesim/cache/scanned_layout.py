"""What the compiled replay of the scanned policies and its caller share: codes and rows; no compiler is needed."""

from __future__ import annotations

from moesim.cache.policies.edgemoe import EdgeMoePolicy, EdgeMoePrintedPolicy
from moesim.cache.policies.fifo import FifoPolicy
from moesim.cache.policies.fld import FldPolicy
from moesim.cache.policies.hobbit import HobbitPolicy
from moesim.cache.policies.lfu_fifo import LfuFifoPolicy
from moesim.cache.policies.lfuda import LfudaPolicy
from moesim.cache.policies.lhu import LhuPolicy
from moesim.cache.policies.moe_infinity import MoeInfinityPolicy
from moesim.cache.policies.mrs import MrsPolicy, MrsRepositoryPolicy
from moesim.cache.policies.sch import SegmentCache4Policy, SegmentCache64Policy, SegmentCachePolicy

# Codes of the policies that the loop knows. A new one: a code here, its score in kernels/scanned.py.
FIFO, LFU_FIFO, LFUDA, FLD, LHU, HOBBIT, EDGEMOE, EDGEMOE_PRINTED, MRS, MOE_INFINITY, SCH = range(11)
SCANNED_CODES: dict[object, int] = {
    FifoPolicy: FIFO, LfuFifoPolicy: LFU_FIFO, LfudaPolicy: LFUDA, FldPolicy: FLD, LhuPolicy: LHU, HobbitPolicy: HOBBIT,
    EdgeMoePolicy: EDGEMOE, EdgeMoePrintedPolicy: EDGEMOE_PRINTED, MrsPolicy: MRS, MrsRepositoryPolicy: MRS,
    MoeInfinityPolicy: MOE_INFINITY, SegmentCache4Policy: SCH, SegmentCachePolicy: SCH, SegmentCache64Policy: SCH}
READS_STARTS, READS_SCORES = (LHU, HOBBIT, MOE_INFINITY), (LHU, HOBBIT, MRS)

# Rows of the state, by key: whether resident and seen, uses, the access of the last use or entry, the place in the order of
# entry, the token of the last use (HOBBIT), K (LFUDA), uses in the window (SCH).
RESIDENT, SEEN, COUNT, LAST, ENTRY, USED_BY, PRIORITY, WINDOW = range(8)
NUM_ROWS = 8
