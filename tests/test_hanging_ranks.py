"""A rank that hangs is named by the others and the run ends; one that is only slow is waited for."""

import re
import signal
import sys
import time

import pytest
from test_faults_of_processes import SMALL, begin, finish, wait_for_step

from hbt_fast.engine.watch import Place, Report, verdict

WATCHED = [*SMALL, "train.hang_minutes=0.1"]  # 6 seconds
PATCHED = """
import sys, time
from hbt_fast import train
from hbt_fast.encoder.towers import Towers
forward, save, calls, rank = Towers.forward, train.save_checkpoint, [0], int(__import__("os").environ["RANK"])

def dawdle(*inputs):
    calls[0] += 1
    if rank == 1 and {first} <= calls[0] < {first} + {times}:
        print("dawdling", flush=True)
        for _ in range(10 * {seconds}):  # a single sleep would be over where the process is stopped meanwhile
            time.sleep(0.1)
    return forward(*inputs)

def save_slowly(*arguments, **options):
    time.sleep({checkpoint_seconds})
    return save(*arguments, **options)

Towers.forward, train.save_checkpoint = dawdle, save_slowly
train.main(sys.argv[1:])
"""


def patched(**numbers) -> list[str]:
    """The program, with embeddings that take long on rank 1 and checkpoints that take long."""
    numbers = {"first": 15, "times": 1, "seconds": 0, "checkpoint_seconds": 0, **numbers}
    return [sys.executable, "-c", PATCHED.format(**numbers)]


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_process_that_is_stopped_is_named(tmp_path, stopped):
    ranks = begin(tmp_path, "run", 2, *WATCHED)
    wait_for_step(ranks[0], 5)
    ranks[stopped].send_signal(signal.SIGSTOP)
    ((status, said),) = finish([ranks[1 - stopped]])
    ranks[stopped].kill()
    finish([ranks[stopped]])
    assert status == 1, said
    if stopped:
        assert "hbt_fast.train: rank 1 hangs: nothing has been heard from there for" in said
        assert re.search(r"rank 1 was in step \d+, .* when it last reported", said)
        assert re.search(r"rank 0 waits in step \d+, ", said)
    else:  # it is the one that the others report to
        assert re.search(r"hbt_fast.train: rank 1 has been in step \d+, .* does not answer: rank 0", said)
    assert "train.resume=true goes on (train.hang_minutes is 0.1)" in said


def test_a_rank_that_hangs_is_named_with_what_it_is_doing(tmp_path):
    ended = finish(begin(tmp_path, "run", 2, *WATCHED, program=patched(seconds=1000)))
    assert [status for status, _ in ended] == [1, 1], ended
    for _, said in ended:
        assert re.search(r"hbt_fast.train: rank 1 hangs in step \d+, (re-)?embed for 0.1\d* minutes", said)
        assert re.search(r"rank 0 waits in step \d+, ", said)
        assert ", in dawdle" in said


def test_slow_micro_batches_and_slow_checkpoints_are_waited_for(tmp_path):
    slow = patched(first=31, times=6, seconds=2, checkpoint_seconds=9)
    few = ["train.steps=6", "train.checkpoint_every=0", "train.micro_batch_tokens=32", "train.keep_gib=0"]
    ended = finish(begin(tmp_path, "run", 2, *WATCHED, *few, program=slow))
    assert [status for status, _ in ended] == [0, 0], ended


def test_a_job_that_was_suspended_as_a_whole_goes_on(tmp_path):
    ranks = begin(tmp_path, "run", 2, *WATCHED, program=patched(seconds=5))
    assert any(line == "dawdling\n" for line in ranks[1].stdout)
    time.sleep(2)  # both have reported that they are there
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            rank.send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(9)
    assert [status for status, _ in finish(ranks)] == [0, 0]


def reports(*places, idle=60.0):
    return {rank: Report(9, Place(*place), idle, f"stack of {rank}") for rank, place in enumerate(places)}


EMBED, LATER, LOSS = (7, 1, -3, "embed"), (7, 1, -1, "embed"), (7, 2, 0, "loss")


def test_who_is_behind_hangs():
    said = verdict(reports(LOSS, EMBED, LOSS), set(), 0, 3, 60.0)
    assert said.startswith("rank 1 hangs in step 7, embed for 1 minutes; ranks 0, 2 wait in step 7, lo")
    assert "Rank 1 is here:\nstack of 1" in said
    assert verdict(reports(LATER, LATER, EMBED), set(), 2, 3, 60.0).startswith("rank 2 hangs in step 7, em")
    assert verdict(reports((8,), (7, 5, 0, "log")), set(), 0, 2, 60.0).startswith("rank 1 hangs in step 7, log")
    assert verdict(reports(EMBED, LOSS, EMBED), set(), 1, 3, 60.0).startswith("ranks 0, 2 hang in step 7, embed")


def test_nobody_is_accused_while_a_rank_moves_writes_or_has_not_been_heard():
    moving = {**reports(LOSS, EMBED), 1: Report(9, Place(*EMBED), 59.0)}
    assert verdict(moving, set(), 0, 2, 60.0) is None
    assert verdict(reports(LOSS, (7, 5, 0, "checkpoint")), set(), 0, 2, 60.0) is None
    assert verdict({0: reports(LOSS)[0]}, set(), 0, 2, 60.0) is None


def test_silence_and_a_collective_that_does_not_come_back_have_words_of_their_own():
    said = verdict(reports(LOSS, LOSS, EMBED), {1}, 0, 3, 60.0)
    assert said.startswith("rank 1 hangs: nothing has been heard from there for 0.5 minutes or longer")
    assert "rank 1 was in step 7, loss when it last reported); ranks 0, 2 wait in step 7, loss" in said
    assert verdict({0: reports(LOSS)[0]}, {1}, 0, 2, 60.0).startswith("rank 1 hangs: nothing has been heard")
    said = verdict(reports(LOSS, LOSS), set(), 1, 2, 60.0)
    assert said.startswith("all ranks have been in step 7, loss for 1 minutes: a collective does not come back")
    assert said.endswith("Rank 1 is here:\nstack of 1")
