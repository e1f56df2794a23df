"""What the basic blocks of a kernel do, from LLVM's text of it: adds, multiplies, conversions, masks, loads.

Times how often each block ran (the runtime counts that) this is the mix of operations of a launch, of all lanes. What
the shim does inside a simd or matrix operation is left out: those are counted as such. Knows no launch.
"""

import re
from collections import Counter
from collections.abc import Sequence

_GUARDS = re.compile(
    r"^@(__sancov_gen_[.\d]*) = private (?:unnamed_addr )?global \[(\d+) x i32\]", re.MULTILINE
)
_GUARD_CALL = re.compile(r"@__sanitizer_cov_trace_pc_guard\((.*)")
# The guard of a block is the array's first, or one by its index, or one by its distance in bytes.
_GUARD = re.compile(
    r"@(__sancov_gen_[.\d]*)(?:, i64 0, i64 (?P<index>\d+)|(?: to i64\))?, i64 (?P<bytes>\d+))?"
)
_LABEL = re.compile(r"\n(?:[\w.$-]+|\"[^\"]*\"):[^\n]*")
_FLAG = r"(?:fast|contract|reassoc|nsz|nnan|ninf|arcp|afn|nuw|nsw|exact|disjoint|nneg|volatile|samesign)"
_OPERATION = re.compile(
    rf"= (?:{_FLAG} )*(fadd|fsub|fmul|fdiv|fneg|fptrunc|fpext|uitofp|sitofp|fptoui|fptosi|add|sub|mul|udiv|sdiv|urem|"
    rf"srem|and|or|xor|shl|lshr|ashr|icmp|fcmp|select|load)\b(?: {_FLAG})*(?: \w+(?= <))?(?: <(\d+) x)?"
)
_INTRINSIC = re.compile(r"call [^@\n]*@llvm\.(\w+)\.(?:v(\d+))?(?:b?f\d+|i\d+)\b")
_CALL = re.compile(r"call [^@\n]*@((?!llvm\.|emu_|_)\w+)\(")
_STORE = re.compile(r"\n\s+store ")


def static_mix(module: str) -> list[dict[str, int]]:
    """Operations of each basic block, in the order in which the runtime counts blocks; a vector counts its lanes."""
    firsts, total = {}, 0
    for match in _GUARDS.finditer(module):
        firsts[match[1]] = total
        total += int(match[2])
    blocks: list[dict[str, int]] = [{} for _ in range(total)]
    for function in module.split("\ndefine ")[1:]:
        if "!dbg" not in function.split("\n", 1)[0]:
            continue  # the shim's own: how a simd operation is done here says nothing of a GPU
        for block in _LABEL.split(function.split("\n}", 1)[0]):
            call = _GUARD_CALL.search(block)
            guard = _GUARD.search(call[1]) if call else None
            if guard:
                index = int(guard["index"] or 0) + int(guard["bytes"] or 0) // 4
                blocks[firsts[guard[1]] + index] = _operations(block)
    return blocks


def _operations(block: str) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for match in [*_OPERATION.finditer(block), *_INTRINSIC.finditer(block)]:
        counted[match[1]] += int(match[2] or 1)
    counted.update(match[1].removesuffix("f") for match in _CALL.finditer(block))  # expf, exp2f ...
    counted["store"] += len(_STORE.findall(block))
    return {name: count for name, count in counted.items() if count}


def dynamic_mix(blocks: Sequence[dict[str, int]], executions: Sequence[int]) -> dict[str, int]:
    """Operations of a launch: each block's, as often as it ran."""
    mix: Counter[str] = Counter()
    for operations, times in zip(blocks, executions, strict=False):
        for name, count in operations.items():
            mix[name] += count * times
    return {name: count for name, count in mix.most_common() if count}
