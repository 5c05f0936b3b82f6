"""Every codec at several settings, and peers' layouts, on the dense oracle: bytes, noise, gradients, speed.

A row of the table is one codec or layout:
    entries        kept (id, weight) pairs
    bytes          a position, on disk, whole file (without the rank table of compact layouts: one a cache)
    variance       mean of |w - t|^2: trace variance of an unbiased codec, squared bias of a biased one
    kl             KL(best target || teacher), nats: the error of the best student of these targets
    angle          degrees between the gradient of a linear student's head and that of the full teacher, over
                   all positions: untrained and trained student
    encode/decode  positions a second on one core: logits to columns; file to tensors with every check
Draws docs/codecs.svg where --plot is given. Last line: JSON.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import common
import numpy as np
import oracle
import peers
import pyarrow as pa
import torch

from pipeline.codecs.encoders import rounding_noise
from pipeline.codecs.sparsify import sparsify
from pipeline.data import counter_rng
from pipeline.data.counter_rng import Keys
from pipeline.losses.sparse import SparseTargets
from pipeline.runtime import hardware
from storage import compact, records
from storage.checksums import check_files, file_entry
from storage.codecs import Sample, SparseCodec, Threshold, TopK
from storage.entries import Entries, concatenate, ends
from storage.fingerprints import input_hash, row_id
from storage.records import EntryRows

CHUNK = 512
TABLE = "0" * 64  # the ranks' fingerprint: not needed to read a file alone
RANKED_POSITIONS = 1024
STEPS, BATCH = 60, 1024  # of the trained student


class Row(NamedTuple):
    """One row of the table; columns as in the docstring above."""

    entries: float
    bytes: float
    variance: float
    kl: float
    angle_untrained: float
    angle_trained: float
    encode_per_s: float
    decode_per_s: float


class Student(NamedTuple):
    """A linear student: its head, and the gradient of the full KL."""

    head_VH: torch.Tensor
    full_VH: torch.Tensor


def stillroom_codecs() -> dict[str, SparseCodec]:
    found: dict[str, SparseCodec] = {}
    for tau in (0.1, 0.085, 0.07, 0.035):
        found[f"threshold {tau}"] = Threshold(tau=tau, seed=0, layout="compact", ranks=TABLE)
    found["threshold 0.07 plain"] = Threshold(tau=0.07, seed=0, layout="plain")
    for count in (22, 50):
        found[f"sample {count}"] = Sample(draws=count, seed=0, layout="compact", ranks=TABLE)
    for k in (12, 64):
        found[f"topk {k}"] = TopK(k=k, layout="compact", ranks=TABLE)
    found["topk 64 plain"] = TopK(k=64, layout="plain")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true", help="draw docs/codecs.svg")
    options = parser.parse_args()
    known = oracle.load()
    num, vocab = known.logits_PV.shape
    forward = oracle.forward_seconds(known.tokens)
    hardware.pin_threads(hardware.num_cores())
    print(f"{num:,} positions, {vocab:,} ids; forward pass {forward * 1e6:,.0f} us a position and core")
    states_PH = torch.from_numpy(known.states_PH)
    teacher_VH = sum(softmax(known, part).T @ states_PH[part] for part in parts(num))
    students = [untrained(vocab), trained(known, states_PH)]
    students = [
        student._replace(full_VH=full_gradient(student, states_PH, teacher_VH)) for student in students
    ]
    hardware.pin_threads(1)
    pa.set_cpu_count(1)
    mass = sum(softmax(known, part).sum(0) for part in parts(RANKED_POSITIONS))
    ranks = compact.Ranks(compact.rank_by(mass.double().numpy()), vocab)
    table: dict[str, Row] = {}
    with TemporaryDirectory() as directory:
        for name, codec in stillroom_codecs().items():
            table[name] = measure(
                known,
                codec,
                ranks,
                students,
                teacher_VH,
                Path(directory) / (name.replace(" ", "-") + ".parquet"),
            )
            show(name, table[name])
        for name, row in peer_rows(known, Path(directory), students, teacher_VH).items():
            table[name] = row
            show(name, row)
    if options.plot:
        plot(table, Path("docs/codecs.svg"))
    best = table["threshold 0.07"]
    lists = table["distillkit exact 64"].decode_per_s
    common.print_result(
        {
            "codecs": {
                name: {
                    "entries": row.entries, "bytes": row.bytes, "variance": row.variance, "kl": row.kl,
                    "angle_deg": row.angle_trained, "angle_untrained_deg": row.angle_untrained,
                    "encode_per_s": row.encode_per_s, "decode_per_s": row.decode_per_s,
                }
                for name, row in table.items()
            },
            "encode_over_forward": 1 / best.encode_per_s / forward,
            "decode_over_distillkit_lists": best.decode_per_s / lists,
            "positions": num,
        }
    )  # fmt: skip


def parts(num: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, num)) for start in range(0, num, CHUNK)]


def logits_of(known: oracle.Oracle, part: slice) -> torch.Tensor:
    return torch.from_numpy(np.array(known.logits_PV[part]))


def softmax(known: oracle.Oracle, part: slice) -> torch.Tensor:
    return torch.softmax(logits_of(known, part), -1)


def untrained(vocab: int) -> Student:
    """A head of small random weights."""
    generator = torch.Generator().manual_seed(0)
    return Student(0.1 * torch.randn(vocab, oracle.HIDDEN, generator=generator), torch.zeros(0))


def trained(known: oracle.Oracle, states_PH: torch.Tensor) -> Student:
    """The same head after some steps on the full probabilities."""
    head = untrained(known.logits_PV.shape[1]).head_VH.requires_grad_()
    optimizer = torch.optim.Adam([head], lr=0.1)
    for step in range(STEPS):
        start = step * BATCH % len(states_PH)
        part = slice(start, start + BATCH)
        teacher_probs = softmax(known, part)
        student_probs = torch.softmax(states_PH[part] @ head.detach().T, -1)
        head.grad = (student_probs - teacher_probs).T @ states_PH[part] / BATCH
        optimizer.step()
    return Student(head.detach(), torch.zeros(0))


def student_probs_of(student: Student, states_NH: torch.Tensor) -> torch.Tensor:
    return torch.softmax(states_NH @ student.head_VH.T, -1)


def full_gradient(student: Student, states_PH: torch.Tensor, teacher_VH: torch.Tensor) -> torch.Tensor:
    own = sum(
        student_probs_of(student, states_PH[part]).T @ states_PH[part] for part in parts(len(states_PH))
    )
    return own - teacher_VH


def angle(one: torch.Tensor, other: torch.Tensor) -> float:
    """Degrees between two gradients."""
    one, other = one.double(), other.double()
    cosine = (one * other).sum() / (one.norm() * other.norm())
    return float(torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))))


def names(num: int) -> tuple[list[str], Keys]:
    """The row ids of the oracle's documents, and the keys of all positions."""
    rows = [row_id("oracle", str(number)) for number in range(num // oracle.LENGTH)]
    words = np.repeat(counter_rng.row_words(rows), oracle.LENGTH, axis=0)
    return rows, Keys(words, np.tile(np.arange(oracle.LENGTH), len(rows)))


def measure(
    known: oracle.Oracle, codec: SparseCodec, ranks: compact.Ranks, students: list[Student],
    teacher_VH: torch.Tensor, path: Path,
) -> Row:  # fmt: skip
    num = len(known.logits_PV)
    rows, keys = names(num)
    seconds, made = 0.0, []
    for part in parts(num):
        logits = logits_of(known, part)
        started = time.perf_counter()
        made.append(sparsify(logits, codec, keys.part(part.start, part.stop)))
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    entries = concatenate(made)
    packed = codec.pack(entries, ranks, rounding_noise(codec, entries, keys))
    seconds += time.perf_counter() - started
    lengths = np.full(len(rows), oracle.LENGTH, np.int32)
    hashes = pa.array([input_hash(ids) for ids in known.tokens])
    records.write_sparse(
        path, EntryRows(pa.array(rows), hashes, lengths, lengths, entries), codec, (), packed
    )
    entry = file_entry(path.parent, path.name)

    def decode() -> SparseTargets:
        check_files(path.parent, [entry])
        return SparseTargets.of(records.read_sparse(path, codec, ranks).entries)

    back = records.read_sparse(path, codec, ranks).entries
    quality = compare(known, back, students, teacher_VH)
    return Row(
        float(entries.counts.mean()), entry.bytes / num, *quality, num / seconds,
        num / common.medians({"decode": decode}, rounds=5)["decode"],
    )  # fmt: skip


def compare(
    known: oracle.Oracle, kept: Entries, students: list[Student], teacher_VH: torch.Tensor
) -> tuple[float, float, float, float]:
    """(variance, kl, angle of the untrained student, of the trained one) of these targets.

    Targets with a tail get the gradient of the bucket loss, and their best target spreads the tail evenly.
    """
    num, vocab = known.logits_PV.shape
    states_PH = torch.from_numpy(known.states_PH)
    bucket = bool(np.isfinite(kept.log_tail).any())
    variance = kl = 0.0
    target_VH = torch.zeros_like(teacher_VH)
    gradients = [torch.zeros_like(teacher_VH) for _ in students]
    for part in parts(num):
        probs, states = softmax(known, part), states_PH[part]
        targets = SparseTargets.of(kept.take(np.arange(part.start, part.stop)))
        at, w = (targets.positions, targets.ids), targets.weights.double()
        t = probs[at].double()
        variance += float((probs.double() ** 2).sum() - 2 * (w * t).sum() + (w**2).sum())
        held = w > 0
        kl += float((w[held] * (w[held] / t[held]).log()).sum())
        mass = torch.zeros(len(probs), dtype=torch.float64).index_add(0, at[0], t)
        if bucket:
            others = vocab - torch.bincount(at[0], minlength=len(probs))
            log_rest = probs.double().clamp(min=1e-30).log()
            log_rest = log_rest.sum(1) - torch.zeros(len(probs), dtype=torch.float64).index_add(
                0, at[0], t.log()
            )
            tail = targets.log_tail.double().exp()
            even = (tail / others).clamp(min=1e-300)
            kl += float((tail * (even.log() - log_rest / others)).sum())
            variance += float((tail**2 / others).sum() - 2 * (even * (1 - mass)).sum())
            for student, total in zip(students, gradients, strict=True):
                p = student_probs_of(student, states)
                b = torch.zeros(len(p)).index_add(0, at[0], p[at])
                a = 1 - tail.float()
                c = (a - b) / (1 - b).clamp(min=1e-6)
                total += (c[:, None] * p).T @ states
                extra = (1 - c[at[0]]) * p[at] - targets.weights
                total.index_add_(0, at[1], extra[:, None] * states[at[0]])
        else:
            target_VH.index_add_(0, at[1], targets.weights[:, None] * states[at[0]])
    if not bucket:
        gradients = [student.full_VH + teacher_VH - target_VH for student in students]
    angles = [angle(gradient, student.full_VH) for gradient, student in zip(gradients, students, strict=True)]
    return variance / num, kl / num, angles[0], angles[1]


def peer_rows(
    known: oracle.Oracle, directory: Path, students: list[Student], teacher_VH: torch.Tensor
) -> dict[str, Row]:
    """Peers' layouts on the same positions; top-k is renormalised, as their losses do by default."""
    num, vocab = known.logits_PV.shape
    found = {}
    for k in (12, 64, 128):
        top = top_of(known, k)
        quality = compare(known, renormalised(top), students, teacher_VH)
        ways: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
            f"distillkit exact {k}": (
                lambda path, top=top: peers.distillkit_write(path, top),
                lambda path, k=k: peers.distillkit_read(path, k, vocab),
            ),
            f"distillkit recommended {k}": (
                lambda path, top=top: peers.distillkit_write(path, top, peers.EXACT),
                lambda path, k=k: peers.distillkit_read(path, k, vocab, peers.EXACT),
            ),
            f"megatron {k}": (
                lambda path, top=top: peers.megatron_write(path, top),
                lambda path, k=k: peers.megatron_read(path, k),
            ),
            f"json lines {k}": (lambda path, top=top: peers.lines_write(path, top), peers.lines_read),
        }
        if k == 12:  # 16 of its values would be exact: the same as exact
            del ways["distillkit recommended 12"]
        for name, (write, read) in ways.items():
            if k == 128 and "recommended" not in name:
                continue
            found[name] = timed(directory / name.replace(" ", "-"), k, num, write, read, quality)
    codec = Sample(draws=22, seed=0, layout="plain")
    entries = concatenate([
        sparsify(logits_of(known, part), codec, names(num)[1].part(part.start, part.stop))
        for part in parts(num)
    ])  # fmt: skip
    counts = np.rint(entries.weights * codec.draws).astype(np.int64)
    found["rs-kd 24 bit 22"] = timed(
        directory / "rskd", float(entries.counts.mean()), num,
        lambda path: peers.rskd_write(path, entries.ids.astype(np.int64), counts, entries.counts),
        lambda path: peers.rskd_read(path, codec.draws),
        compare(known, entries, students, teacher_VH),
    )  # fmt: skip
    return found


def timed(
    path: Path, kept: float, num: int, write: Callable[[Path], Any], read: Callable[[Path], Any], quality: Any
) -> Row:
    started = time.perf_counter()
    write(path)
    wrote = time.perf_counter() - started
    seconds = common.medians({"read": lambda: read(path)}, rounds=2)["read"]
    return Row(kept, path.stat().st_size / num, *quality, num / wrote, num / seconds)


def top_of(known: oracle.Oracle, k: int) -> peers.Top:
    ids, values = [], []
    for part in parts(len(known.logits_PV)):
        best = softmax(known, part).log().topk(k)
        ids.append(best.indices.numpy())
        values.append(best.values.numpy())
    return peers.Top(np.concatenate(ids), np.concatenate(values), known.logits_PV.shape[1])


def renormalised(top: peers.Top) -> Entries:
    num, k = top.ids_PK.shape
    weights = np.exp(top.log_probs_PK.astype(np.float64))
    weights /= weights.sum(axis=1, keepdims=True)
    none = np.full(num, -np.inf, np.float32)
    counts = np.full(num, k, np.int32)
    return Entries(
        ends(counts),
        top.ids_PK.reshape(-1).astype(np.int32),
        weights.reshape(-1).astype(np.float32),
        counts,
        none,
    )


def show(name: str, row: Row) -> None:
    print(
        f"{name:24} {row.entries:6.1f} entries {row.bytes:8.1f} B {row.variance:8.4f} var {row.kl:7.3f} kl "
        f"{row.angle_untrained:5.1f} {row.angle_trained:5.1f} deg "
        f"{row.encode_per_s:10,.0f} enc/s {row.decode_per_s:11,.0f} dec/s",
        flush=True,
    )


def plot(table: dict[str, Row], path: Path) -> None:
    """Left: the noise of unbiased targets. Right: the angle of every target's gradient."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kinds: dict[str, list[Row]] = {}
    for name, row in table.items():
        if "plain" not in name:
            kinds.setdefault(name.rsplit(" ", 1)[0], []).append(row)
    style = dict(zip(kinds, "osDv^<>P", strict=True))
    colours = dict(zip(kinds, mpl.color_sequences["tab10"], strict=False))
    settings = {"svg.hashsalt": "stillroom", "svg.fonttype": "none", "font.size": 9}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        noise, angles = figure.subplots(1, 2)
        for kind, rows in kinds.items():
            line_style = {"marker": style[kind], "color": colours[kind], "label": kind}
            rows = sorted(rows, key=lambda row: row.bytes)
            sizes = [row.bytes for row in rows]
            if kind in ("threshold", "sample", "rs-kd 24 bit"):
                noise.plot(sizes, [row.variance for row in rows], **line_style)
            angles.plot(sizes, [row.angle_trained for row in rows], **line_style)
        noise.set_ylabel("variance of the target (unbiased codecs)")
        noise.set_ylim(bottom=0)
        noise.set_xlim(left=0)
        angles.set_ylabel("degrees from the full teacher's gradient")
        angles.set_xscale("log")
        angles.set_ylim(bottom=0)
        for axes in (noise, angles):
            axes.set_xlabel("bytes a position, on disk")
            axes.grid(color="#e6e8ec")
        angles.legend(fontsize=8, ncols=2)
        figure.savefig(path, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


if __name__ == "__main__":
    main()
