"""Tests of linger.py: `python3 -m unittest`, standard library only, loopback only.

The layers, each over the one above it: Store, Broker (with a clock of its own), the HTTP server
(real sockets), the client, the process (`python linger.py`, killed by its pid), the files.
"""

import ast
import base64
import bisect
import collections
import contextlib
import datetime
import dis
import doctest
import errno
import fcntl
import functools
import gc
import hashlib
import http.client
import http.server
import inspect
import io
import itertools
import json
import math
import os
import py_compile
import queue
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import tracemalloc
import types
import unittest
import unittest.mock
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import linger

HERE = Path(__file__).resolve().parent
SOURCE = (HERE / "linger.py").read_text()
PATIENCE = 20.0  # seconds after which a test that waits for something fails
STRICT = ("-S", "-X", "dev", "-W", "error")  # without site-packages, which take time to load
compiled = ""  # linger.py as most processes run it


def setUpModule():
    """Compiles linger.py once for all processes, which halves the time that each takes to start."""
    global compiled
    folder = tempfile.TemporaryDirectory(prefix="linger-test-")
    unittest.addModuleCleanup(folder.cleanup)
    compiled = os.path.join(folder.name, "linger.pyc")
    py_compile.compile(str(HERE / "linger.py"), compiled, doraise=True)
    cache = {"PYTHONPYCACHEPREFIX": folder.name, "PYTHONDONTWRITEBYTECODE": ""}
    shared_cache = unittest.mock.patch.dict(os.environ, cache)
    shared_cache.start()
    unittest.addModuleCleanup(shared_cache.stop)
    linger.client_logger()  # or `assertLogs` would take its handler away again


@functools.cache
def parse(source):
    """A syntax tree, as the oldest Python reads it; the garbage collector need not look at it."""
    tree = ast.parse(source, feature_version=(3, 9))
    if source is SOURCE:
        gc.freeze()
    return tree


def until(claim, patience=PATIENCE):
    """Waits for a claim to come true; looks less often the longer it takes."""
    start = time.monotonic()
    while not claim():
        waited = time.monotonic() - start
        if waited > patience:
            raise AssertionError(f"did not come true in {patience} s")
        select.select([], [], [], max(0.001, min(waited / 20, 0.02)))


def run_python(program, *arguments, options=STRICT):
    """Runs a program that may import linger; what has ended, with its output and errors."""
    return subprocess.run(
        [sys.executable, *options, "-c", program, *arguments],
        cwd=os.path.dirname(compiled), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


class FakeClock:
    """Clocks that move only when they are told to."""

    def __init__(self, now=None):
        self.now = now or float(int(time.time()))
        self.ahead = 0.0  # by how much the wall clock is wrong

    def time(self):
        return self.now + self.ahead

    def monotonic(self):
        return self.now

    def pass_time(self, seconds):
        self.now += seconds


class ClockAhead:
    """The real clock, some seconds ahead."""

    def __init__(self, ahead):
        self.ahead = ahead

    def time(self):
        return time.time() + self.ahead

    def monotonic(self):
        return linger.SYSTEM_CLOCK.monotonic() + self.ahead


def pass_time(broker, seconds):
    """Puts the clock of a broker forward that began with the real one."""
    clock = broker._clock
    clock.source = ClockAhead(getattr(clock.source, "ahead", 0) + seconds)
    broker.process_due()


def count_waiting(broker, channel="q"):
    """How many consumers wait for a channel."""
    return broker.info(channel)["waiting"]


def pass_touches(broker):
    """Lets 60 seconds pass, in which a message that stays in flight for 30 must be touched."""
    for _ in range(3):
        touches = broker.counters["msg-touch"]
        until(lambda n=touches: broker.counters["msg-touch"] > n)
        pass_time(broker, 20)


@contextlib.contextmanager
def busy(committer):
    """Keeps the committer thread busy: what is submitted meanwhile shares the next transaction."""
    begun, end = threading.Event(), threading.Event()
    operation = linger.Operation()
    operation.done_callback = lambda _: (begun.set(), end.wait(PATIENCE))
    committer.submit(operation)
    begun.wait(PATIENCE)
    try:
        yield
    finally:
        end.set()


def refuse_posts(_, adds):
    """For a store, as the last step before a commit."""
    if adds:
        raise linger.Full("full")


def exchange(client, method, path, body=None, headers=None):
    """A request over a connection: (status, headers, body)."""
    client.request(method, path, body, headers or {})
    answer = client.getresponse()
    return answer.status, answer.headers, answer.read()


class Folder(unittest.TestCase):
    """A test with a temporary folder."""

    def setUp(self):
        self.folder = self.new_folder()
        self.dbfile = str(self.folder / "linger.db")

    def new_folder(self):
        folder = tempfile.TemporaryDirectory(prefix="linger-test-")
        self.addCleanup(folder.cleanup)
        return Path(folder.name)

    def write_tokens(self, text):
        """A file of tokens that only its owner may read."""
        path = self.new_folder() / "tokens"
        path.touch(0o600)
        path.write_text(text)
        return path

    def hasten(self, **intervals):
        """Changes constants of linger for the time of this test."""
        patch = unittest.mock.patch.multiple(linger, **intervals)
        patch.start()
        self.addCleanup(patch.stop)

    def thread(self, function, *arguments):
        """Runs a function in a thread; the future of its result."""
        pool = ThreadPoolExecutor(1)
        self.addCleanup(pool.shutdown)
        return pool.submit(function, *arguments)


# -- Store ---------------------------------------------------------------------------------------

# Made by Linger 1.0.1 itself, all times set back by 1e8 seconds; ids 15 to 19 were deleted.
V1_DATABASE = """
BEGIN;
CREATE TABLE config (key unique,value);
INSERT INTO config VALUES('server_id','c1020c87aa4d43a9b744037aecdfaaae');
CREATE TABLE messages (id integer primary key autoincrement, body, mimetype, topic, timeout,
     priority, channel, ts, linger, purge, deliver, dcount, show);
INSERT INTO messages VALUES(1,X'7265616479206E6F726D616C','text/plain','',30,0,'jobs',
    1695450787.375,0,0,0,0,0.0);
INSERT INTO messages VALUES(2,X'7B226E223A20317D','application/json','',7,-5,'jobs',
    1695450787.378,0,0,0,0,0.0);
INSERT INTO messages VALUES(3,X'ALL-BYTES','application/octet-stream','',30,3,'jobs',
    1695450787.381,0,0,0,0,0.0);
INSERT INTO messages VALUES(4,'form text: ¡olé! 你好 😀','text/plain','',30,0,'jobs',
    1695450787.384,0,0,0,0,0.0);
INSERT INTO messages VALUES(5,X'68696464656E206C6F6E67','text/plain','',1000000000,0,'hidden',
    1695450787.386,0,0,3,1,2695450787.389);
INSERT INTO messages VALUES(6,X'64656C697665722031206F6620322075736564','text/plain','',1,0,
    'partly',1695450787.391,0,0,2,1,0.0);
INSERT INTO messages VALUES(7,X'6C696E67657273206C6F6E67','text/plain','',30,0,'keep',
    1695450787.396,1000000000,2695450787.396,0,0,0.0);
INSERT INTO messages VALUES(8,X'6772C3BCC39F65','text/plain; charset=utf-8','',30,0,'你好/käse',
    1695450787.399,0,0,0,0,0.0);
INSERT INTO messages VALUES(9,X'68696464656E2033302C20636F6D6573206261636B','text/plain','',30,
    0,'late',1695450787.402,0,0,0,1,1695450817.404);
INSERT INTO messages VALUES(10,X'757365642075702C20676F6573','text/plain','',30,1,'late',
    1695450787.406,0,0,1,1,1695450817.409);
INSERT INTO messages VALUES(11,X'6C696E676572732036302C20676F6573','text/plain','',30,0,'late',
    1695450787.411,60,1695450847.411,0,0,0.0);
INSERT INTO messages VALUES(12,
    X'746F7563686564207768696C652072656164793A2068696464656E2C206E657665722064656C697665726564',
    'text/plain','',1000000000,0,'touched',1695450787.413,0,0,0,0,2695450787.416);
INSERT INTO messages VALUES(13,X'7075626C6973686564','text/plain','news',11,-2,'sub-a',
    1695450787.425,1000000000,2695450787.425,4,0,0.0);
INSERT INTO messages VALUES(14,X'7075626C6973686564','text/plain','news',30,0,'sub-b',
    1695450787.426,0,0,0,0,0.0);
CREATE TABLE subscriptions (topic,channel,timeout,priority,linger,deliver,ts,
     primary key (topic, channel));
INSERT INTO subscriptions VALUES('news','sub-a',11,-2,1000000000,4,1695450787.418);
INSERT INTO subscriptions VALUES('news','sub-b',30,0,0,0,1695450787.42);
INSERT INTO subscriptions VALUES('thema-ä','sub-a',30,9,0,0,1695450787.422);
DELETE FROM sqlite_sequence;
INSERT INTO sqlite_sequence VALUES('messages',19);
COMMIT;
""".replace("ALL-BYTES", bytes(range(256)).hex())


class StoreCase(Folder):
    def open(self, **options):
        """A committer over a new store, which is `self.store`."""
        self.store = linger.Store(self.dbfile, **options)
        self.addCleanup(self.store.close)
        committer = linger.Committer(self.store)
        self.addCleanup(committer.close)
        return committer

    def run_sql(self, committer, *statements, **parameters):
        return committer.run(linger.Operation(statements, parameters))

    def run_together(self, committer, operations):
        """Runs operations in one transaction; returns when they are done."""
        with busy(committer):
            for operation in operations:
                committer.submit(operation)
        with contextlib.suppress(linger.LingerError):
            committer.run(linger.Operation())


class StoreTest(StoreCase):
    """SQLite and its files, and the group commit over it."""

    def test_operations_share_a_transaction_and_each_gets_its_own_results(self):
        committer = self.open()
        operations = [
            linger.Operation((linger.GET_CONFIG,), {"key": k}) for k in ("server_id", "x")
        ]
        commits = []
        self.store._writer.set_trace_callback(lambda sql: commits.append(sql == "commit"))
        with busy(committer):
            commits.clear()
            for operation in operations:
                committer.submit(operation)
            last = self.thread(committer.run, linger.Operation())
            until(lambda: len(committer._pending) == 3)
        last.result(PATIENCE)
        results = [operation.rows() for operation in operations]
        self.assertEqual(sum(commits), 1)
        self.assertEqual(len(results[0][0]), 1)
        self.assertEqual(results[1], [[]])

    def test_a_refused_operation_leaves_no_trace_and_harms_no_neighbor(self):
        committer = self.open()
        good = "insert into config (key, value) values (:key, 1)"
        bad = "insert into config (key, value) values (null, null)"
        operations = [
            linger.Operation((good,), {"key": "a"}),
            linger.Operation((good, bad), {"key": "b"}),
            linger.Operation((good,), {"key": "c"}),
        ]
        self.run_together(committer, operations)
        operations[0].rows()
        with self.assertRaises(linger.Unavailable):
            operations[1].rows()
        operations[2].rows()
        (rows,) = committer.read("select key from config where length(key) = 1 order by key")
        self.assertEqual(rows, [("a",), ("c",)])

    def test_an_operation_that_is_repeated_alone_is_synced(self):
        committer = self.open()
        take = linger.Operation()
        take.durable = False
        self.run_together(committer, [take])
        self.assertFalse(take.durable)
        self.run_together(committer, [take, linger.Operation(("nonsense",))])
        self.assertTrue(take.durable)

    def test_a_statement_that_fails_half_way_leaves_no_trace(self):
        committer = self.open()
        add = (
            "insert into messages (channel, priority, state, due_at, timeout, deliver, received,"
            " linger, expires_at, type, body) values ('q', 0, 0, 0, 30, 0, 0, 0, 0, 'x', x'31')"
        )
        self.run_sql(committer, add, add)
        bad = "update messages set channel = 'r', type = case when id < 2 then type end"
        operations = [
            linger.Operation((sql,)) for sql in (bad, "delete from messages where id = 1")
        ]
        self.run_together(committer, operations)
        with self.assertRaisesRegex(linger.Unavailable, "NOT NULL"):
            operations[0].rows()
        operations[1].rows()
        (rows,) = committer.read("select name, ready from channels")
        self.assertEqual(rows, [("q", 1)])

    def test_callbacks_run_in_the_order_of_submission_and_done_ones_after_the_commit(self):
        committer, calls = self.open(), []

        class Recorded(linger.Operation):
            def on_executed(self):
                calls.append(("executed", self.owner))

            def on_commit(self):
                calls.append(("commit", self.owner))

            def on_done(self):
                calls.append(("done", self.owner))

        operations = [Recorded() for _ in range(3)]
        for number, operation in enumerate(operations):
            operation.owner = number
        self.run_together(committer, operations)
        kinds = ("executed", "commit", "done")
        self.assertEqual(calls, [(kind, n) for kind in kinds for n in range(3)])

    def test_what_is_submitted_while_the_committer_falls_asleep_is_done(self):
        late, done = linger.Operation(), queue.SimpleQueue()
        late.done_callback = done.put

        class Drowsy(linger.Committer):
            asleep, submitted = False, False

            @property
            def _sleeps(self):
                return self.asleep

            @_sleeps.setter
            def _sleeps(self, value):
                if value and not self.submitted:
                    self.submitted = True
                    self.submit(late)  # which rings nobody, for nobody sleeps yet
                self.asleep = value

        store = linger.Store()
        self.addCleanup(store.close)
        self.addCleanup(Drowsy(store).close)
        self.assertIs(done.get(timeout=PATIENCE), late)

    def test_a_signal_handler_may_call_or_raise_as_the_committer_is_woken(self):
        committer, call, done = self.open(), linger.Operation(), queue.SimpleQueue()
        call.done_callback = done.put
        until(lambda: committer._sleeps)

        def handle():
            patch.stop()
            committer.submit(call)
            done.get(timeout=PATIENCE)
            raise KeyboardInterrupt

        patch = unittest.mock.patch.object(committer._waker, "wake", handle)
        patch.start()
        self.assertRaises(KeyboardInterrupt, committer.submit, linger.Operation())
        committer.run(linger.Operation())

    def test_an_operation_that_joins_is_in_the_same_transaction(self):
        committer, joined = self.open(), linger.Operation((linger.GET_CONFIG,), {"key": "k"})

        class Joins(linger.Operation):
            def on_executed(self):
                committer.join_transaction(joined)

        committer.run(Joins((linger.SET_CONFIG,), {"key": "k", "value": "1"}))
        self.assertEqual(joined.rows(), [[("1",)]])
        with self.assertRaises(AssertionError):
            committer.join_transaction(joined)

    def joining(self, committer, **attributes):
        """An operation that writes "1" and is joined by one that reads it; those that joined in
        vain are on the list `dropped`."""

        class Joined(linger.Operation):
            def on_dropped(self):
                operation.dropped.append(self)

        class Joins(linger.Operation):
            def on_executed(self):
                self.durable = True
                self.joined = Joined((linger.GET_CONFIG,), {"key": "k"})
                committer.join_transaction(self.joined)

        operation = Joins((linger.SET_CONFIG,), {"key": "k", "value": "1"})
        operation.dropped = []
        vars(operation).update(attributes)
        return operation

    def test_what_joins_is_decided_anew_after_a_transaction_that_failed(self):
        committer = self.open()
        operation = self.joining(committer)
        later = linger.Operation((linger.SET_CONFIG,), {"key": "k", "value": "2"})
        self.run_together(committer, [operation, later, linger.Operation(("nonsense",))])
        self.assertEqual(operation.joined.rows(), [[("1",)]])
        self.assertEqual(len(operation.dropped), 1)
        self.assertNotIn(operation.joined, operation.dropped)

    def test_what_joins_is_decided_anew_when_a_transaction_turns_out_to_be_synced(self):
        committer = self.open()
        committer.run(linger.Operation())
        operation = self.joining(committer, durable=False)
        committer.run(operation)
        self.assertEqual(operation.joined.rows(), [[("1",)]])
        self.assertEqual(len(operation.dropped), 1)

    def test_an_operation_is_done_though_what_joins_it_is_refused(self):
        committer, done = self.open(), []

        class Joins(linger.Operation):
            def on_executed(self):
                joined = linger.Operation(("nonsense",))
                joined.done_callback = done.append
                committer.join_transaction(joined)

        committer.run(Joins((linger.SET_CONFIG,), {"key": "k", "value": "1"}))
        self.assertEqual(committer.read(linger.GET_CONFIG, key="k"), [[("1",)]])
        self.assertEqual([type(operation.error) for operation in done], [linger.Unavailable])

    def test_a_callback_that_would_wait_for_itself_gets_an_error(self):
        committer, errors = self.open(), []

        def run_again(_):
            for call in (
                lambda: committer.run(linger.Operation()),
                committer.close,
            ):
                try:
                    call()
                except RuntimeError as error:
                    errors.append(str(error))

        operation = linger.Operation()
        operation.done_callback = run_again
        committer.submit(operation)
        committer.run(linger.Operation())
        self.assertEqual(len(errors), 2)
        self.assertIn("must not make a call that waits", errors[0])

    def test_what_a_callback_submits_is_run_too(self):
        committer, second = self.open(), linger.Operation()
        done = threading.Event()
        second.done_callback = lambda _: done.set()
        first = linger.Operation()
        first.done_callback = lambda _: committer.submit(second)
        committer.submit(first)
        self.assertTrue(done.wait(PATIENCE))

    def test_nothing_that_a_callback_raises_ends_the_committer(self):
        committer = self.open()
        for error in (ZeroDivisionError, SystemExit, KeyboardInterrupt):
            operation = linger.Operation()
            operation.done_callback = unittest.mock.Mock(side_effect=error)
            with contextlib.redirect_stderr(io.StringIO()) as log:
                committer.submit(operation)
                committer.run(linger.Operation())
            self.assertIn(error.__name__, log.getvalue())

    def test_what_is_submitted_after_the_close_fails(self):
        committer, results = self.open(), []
        committer.close()
        operation = linger.Operation()
        operation.done_callback = results.append
        committer.submit(operation)
        self.assertEqual(results, [operation])
        with self.assertRaisesRegex(linger.Unavailable, "closed"):
            operation.result()

    def test_many_threads_lose_no_operation(self):
        committer = self.open(sync="off")
        statement = "insert into config (key, value) values (:key, 1)"

        def work(thread):
            for n in range(50):
                committer.run(linger.Operation((statement,), {"key": f"k{thread}-{n}"}))

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(16)))
        (rows,) = committer.read("select count(*) from config where key like 'k%'")
        self.assertEqual(rows, [(800,)])

    def test_a_full_database_is_507_and_works_again_when_there_is_room(self):
        committer, store = self.open(), self.store
        pages = store._writer.execute("pragma page_count").fetchone()[0]
        store._writer.execute(f"pragma max_page_count = {pages}")
        big = linger.Operation((linger.SET_CONFIG,), {"key": "k", "value": "x" * 100_000})
        with self.assertRaises(linger.Full):
            committer.run(big)
        self.assertEqual(store.read(linger.GET_CONFIG, key="k"), [[]])
        store._writer.execute("pragma max_page_count = 1000000")
        self.run_sql(committer, linger.SET_CONFIG, key="k", value="x" * 100_000)

    def test_a_database_locked_by_another_program_is_503_and_works_again(self):
        committer, store = self.open(), self.store
        store._writer.execute("pragma busy_timeout = 10")
        other = sqlite3.connect(self.dbfile, isolation_level=None)
        self.addCleanup(other.close)
        other.execute("begin immediate")
        with self.assertRaises(linger.Unavailable):
            self.run_sql(committer, linger.SET_CONFIG, key="k", value="1")
        other.execute("rollback")
        self.run_sql(committer, linger.SET_CONFIG, key="k", value="1")

    def test_while_the_database_is_locked_all_pending_operations_fail_at_once(self):
        committer, store = self.open(), self.store
        store._writer.execute("pragma busy_timeout = 100")
        other = sqlite3.connect(self.dbfile, isolation_level=None)
        self.addCleanup(other.close)
        other.execute("begin immediate")
        operations = [linger.Operation((), {}) for _ in range(20)]
        start = time.monotonic()
        self.run_together(committer, operations)
        for operation in operations:
            with self.assertRaises(linger.Unavailable):
                operation.rows()
        self.assertLess(time.monotonic() - start, 2)

    def test_after_a_full_disk_the_log_is_used_again_from_its_start(self):
        committer, store = self.open(), self.store
        self.run_sql(committer, linger.SET_CONFIG, key="k", value="x" * 500_000)
        pages = store._writer.execute("pragma page_count").fetchone()[0]
        store._writer.execute(f"pragma max_page_count = {pages}")
        size = os.stat(self.dbfile + "-wal").st_size
        with self.assertRaises(linger.Full):
            self.run_sql(committer, linger.SET_CONFIG, key="more", value="x" * 500_000)
        for n in range(20):
            self.run_sql(committer, linger.SET_CONFIG, key="small", value=str(n))
        self.assertEqual(os.stat(self.dbfile + "-wal").st_size, size)

    def test_errors_are_told_apart_by_code_or_else_by_their_whole_text(self):
        misleading = sqlite3.OperationalError("no such column: full")
        full = sqlite3.OperationalError("database or disk is full")
        self.assertNotIsInstance(linger.translate_error(misleading), linger.Full)
        self.assertIsInstance(linger.translate_error(full), linger.Full)
        coded = sqlite3.OperationalError("in other words")
        coded.sqlite_errorcode = linger.SQLITE_FULL
        self.assertIsInstance(linger.translate_error(coded), linger.Full)
        coded.sqlite_errorcode = 1
        self.assertNotIsInstance(linger.translate_error(coded), linger.Full)

    def test_an_old_sqlite_is_refused_in_one_sentence(self):
        old = unittest.mock.patch("sqlite3.sqlite_version_info", (3, 30, 1))
        with old, self.assertRaisesRegex(linger.Unavailable, "needs SQLite 3.31 or later"):
            linger.Store(self.dbfile)
        self.assertFalse(os.path.exists(self.dbfile))

    def test_the_log_of_a_database_that_was_deleted_is_not_replayed_into_a_new_one(self):
        committer, store = self.open(), self.store
        self.run_sql(committer, linger.SET_CONFIG, key="old", value="1")
        for suffix in ("-wal", "-shm"):
            shutil.copy(self.dbfile + suffix, self.folder / suffix)
        store.close()
        os.unlink(self.dbfile)
        for suffix in ("-wal", "-shm"):
            shutil.copy(self.folder / suffix, self.dbfile + suffix)
        committer, store = self.open(), self.store
        self.assertEqual(store.read(linger.GET_CONFIG, key="old"), [[]])
        self.assertEqual(store.read("pragma integrity_check"), [[("ok",)]])

    def test_a_deleted_database_is_503_and_works_again_when_it_is_back(self):
        committer = self.open()
        os.rename(self.dbfile, self.dbfile + ".away")
        with self.assertRaisesRegex(linger.Unavailable, "deleted or replaced"):
            self.run_sql(committer, linger.SET_CONFIG, key="k", value="1")
        os.rename(self.dbfile + ".away", self.dbfile)
        self.run_sql(committer, linger.SET_CONFIG, key="k", value="1")

    def test_a_second_store_on_the_same_file_is_refused(self):
        self.open()
        with self.assertRaisesRegex(linger.LingerError, "in use by another Linger"):
            linger.Store(self.dbfile)

    def test_files_that_are_not_ours_are_refused_untouched(self):
        foreign = sqlite3.connect(self.folder / "foreign.db")
        foreign.execute("create table config (a)")
        foreign.commit()
        foreign.close()
        for name, version in (("newer.db", linger.SCHEMA_VERSION + 1), ("older.db", 3)):
            linger.Store(str(self.folder / name)).close()
            with contextlib.closing(sqlite3.connect(self.folder / name)) as connection:
                connection.execute(f"pragma user_version = {version}")
                connection.execute("pragma journal_mode = delete")
        (self.folder / "text.db").write_bytes(b"Dear diary, " * 100)
        (self.folder / "short.db").write_bytes(b"SQLite format 3\0")
        for name in ("foreign.db", "newer.db", "older.db", "text.db", "short.db"):
            with self.subTest(name):
                before = (self.folder / name).read_bytes()
                with self.assertRaises(linger.LingerError) as caught:
                    linger.Store(str(self.folder / name))
                self.assertNotIn("\n", str(caught.exception))
                self.assertEqual((self.folder / name).read_bytes(), before)

    def test_places_where_no_file_can_be_are_refused(self):
        for path in (self.folder, self.folder / "no" / "such", "/proc/linger.db"):
            with self.subTest(path), self.assertRaises(linger.LingerError):
                linger.Store(str(path))

    def test_files_are_for_their_owner_only(self):
        committer = self.open()
        self.run_sql(committer, linger.SET_CONFIG, key="k", value="1")
        for path in self.folder.iterdir():
            self.assertEqual(path.stat().st_mode & 0o777, 0o600, path)

    def test_a_program_that_reads_does_not_delay_the_close(self):
        committer = self.open()
        with contextlib.closing(sqlite3.connect(self.dbfile)) as reader:
            reader.execute("begin")
            reader.execute("select count(*) from messages").fetchall()
            self.run_sql(committer, linger.ADD_CONFIG, key="k", value="v")
            begun = time.monotonic()
            committer.close()
            self.store.close()
            self.assertLess(time.monotonic() - begun, linger.BUSY_TIMEOUT / 2)

    def test_closing_leaves_no_log_behind(self):
        committer = self.open()
        self.run_sql(committer, linger.SET_CONFIG, key="k", value="1")
        committer.close()
        self.store.close()
        self.assertEqual(
            sorted(path.name for path in self.folder.iterdir()),
            ["linger.db", "linger.db-lock", "linger.db-reserve"],
        )
        with self.assertRaises(linger.LingerError):
            self.run_sql(committer, linger.SET_CONFIG, key="k", value="1")

    def test_a_bug_in_a_commit_callback_stops_no_other(self):
        committer, counted = self.open(), []
        operations = [
            linger.Change((), {}, lambda _: 1 / 0),
            linger.Change((), {}, counted.append),
        ]
        with contextlib.redirect_stderr(io.StringIO()) as log:
            self.run_together(committer, operations)
        self.assertIn("ZeroDivisionError", log.getvalue())
        self.assertEqual(counted, [[]])

    def test_a_read_sees_what_was_submitted_before(self):
        committer = self.open()
        with busy(committer):
            committer.submit(linger.Operation((linger.SET_CONFIG,), {"key": "k", "value": "1"}))
            read = self.thread(lambda: committer.read(linger.GET_CONFIG, key="k"))
            until(lambda: len(committer._pending) == 2)
        self.assertEqual(read.result(PATIENCE), [[("1",)]])

    def test_a_read_waits_for_the_transaction_under_way(self):
        committer, begun, end = self.open(), threading.Event(), threading.Event()

        class Slow(linger.Operation):
            def on_executed(self):
                begun.set()
                end.wait(PATIENCE)

        committer.submit(Slow((linger.SET_CONFIG,), {"key": "k", "value": "1"}))
        begun.wait(PATIENCE)
        read = self.thread(lambda: committer.read(linger.GET_CONFIG, key="k"))
        until(lambda: committer._pending)
        end.set()
        self.assertEqual(read.result(PATIENCE), [[("1",)]])

    def test_reads_see_one_moment(self):
        committer = self.open()
        count = "select count(*) from config"
        self.assertEqual(*committer.read(count, count))


class SpaceTest(StoreCase):
    """Disks that are full, and databases at their limit."""

    def small_disk(self, total=4_000_000):
        """A disk of `self.total` bytes, of which `self.free` are."""
        self.total = self.free = total
        real = os.statvfs

        def statvfs(path):
            status = list(real(path))
            status[1], status[2], status[4] = 1, self.total, self.free
            return os.statvfs_result(status)

        patch = unittest.mock.patch("os.statvfs", statvfs)
        patch.start()
        self.addCleanup(patch.stop)

    def adding(self, size, key="k"):
        """An operation that adds so many bytes."""
        operation = linger.Operation((linger.SET_CONFIG,), {"key": key, "value": "x" * size})
        operation.adds = size
        return operation

    def is_full(self):
        with contextlib.suppress(linger.Full):
            return self.store.check_space()
        return True

    def is_reserve_whole(self):
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(self.dbfile + "-reserve")
            size = linger.reserve_of(self.total)
            return status.st_size == size and status.st_blocks * 512 >= size
        return False

    def fail_to_allocate(self, number, times=1):
        """Lets that many files not grow."""
        real, failures = linger.allocate, [OSError(number, os.strerror(number))] * times

        def allocate(*arguments):
            if failures:
                raise failures.pop()
            real(*arguments)

        self.hasten(allocate=allocate)

    def test_a_full_disk_refuses_what_adds_and_two_lines_say_from_when_to_when(self):
        self.small_disk()
        committer = self.open()
        self.assertFalse(self.is_full())
        with contextlib.redirect_stderr(io.StringIO()) as log:
            self.free = 1000
            until(self.is_full)  # what was free is taken to be so for a moment
            with self.assertRaises(linger.Full):
                committer.run(self.adding(1000))
            self.run_sql(committer, linger.SET_CONFIG, key="k", value="1")
            self.free = self.total // 10  # less than a reserve more than what the log may need
            self.assertTrue(self.is_full())
            self.free = self.total
            self.assertFalse(self.is_full())
            committer.run(self.adding(1000))
        full, room = log.getvalue().splitlines()
        self.assertIn("the disk is full", full)
        self.assertIn("there is room on the disk again", room)

    def test_free_pages_inside_are_room_although_the_disk_is_full(self):
        self.small_disk()
        committer = self.open()
        committer.run(self.adding(600_000))
        with contextlib.redirect_stderr(io.StringIO()):
            self.free = 0
            until(self.is_full)
            self.run_sql(committer, linger.SET_CONFIG, key="k", value="")
            self.assertFalse(self.is_full())
        committer.run(self.adding(400_000))

    def test_the_reserve_is_a_real_file_and_is_given_up_for_a_take_and_made_again(self):
        self.small_disk()
        committer = self.open()
        self.assertTrue(self.is_reserve_whole())
        with contextlib.redirect_stderr(io.StringIO()):
            self.free = 0
            until(self.is_full)
            self.fail_to_allocate(errno.ENOSPC)
            self.run_sql(committer, linger.SET_CONFIG, key="k", value="x" * 100_000)
            self.assertFalse(self.is_reserve_whole())
            self.free = self.total
            self.assertFalse(self.is_full())
        self.assertTrue(self.is_reserve_whole())

    def test_without_room_for_the_reserve_it_starts_and_makes_it_later(self):
        self.small_disk()
        self.fail_to_allocate(errno.ENOSPC)
        self.hasten(RESERVE_RETRY_DELAY=0)
        self.open()
        self.assertFalse(self.is_reserve_whole())
        until(lambda: not self.is_full() and self.is_reserve_whole())

    def test_a_system_that_allows_no_such_file_is_served_without(self):
        self.small_disk()
        self.fail_to_allocate(errno.EFBIG)
        committer = self.open()
        self.assertFalse(self.is_full())
        committer.run(self.adding(100_000))
        self.assertFalse(os.path.exists(self.dbfile + "-reserve"))

    @unittest.skipUnless(hasattr(os, "posix_fallocate"), "the system allocates no files")
    def test_the_index_of_the_longest_log_is_allocated_at_the_start(self):
        self.small_disk(400_000_000)
        self.open()
        status = os.stat(self.dbfile + "-shm")
        self.assertEqual(status.st_size, 24 * linger.SHM_REGION)
        self.assertGreaterEqual(status.st_blocks * 512, status.st_size)

    def test_the_file_has_room_for_a_commit_before_it(self):
        committer, store = self.open(), self.store
        committer.run(self.adding(500_000))
        pages = store._writer.execute("pragma page_count").fetchone()[0]
        self.assertGreaterEqual(os.stat(self.dbfile).st_size, pages * 4096 + linger.MIN_GROWTH)

    def test_what_finds_no_room_in_the_file_is_refused_and_no_neighbor_of_it(self):
        committer = self.open()
        large, small = self.adding(500_000), linger.Operation((linger.GET_CONFIG,), {"key": "k"})
        self.fail_to_allocate(errno.EFBIG, times=10)
        self.run_together(committer, [large, small])
        with self.assertRaisesRegex(linger.Full, "nothing was changed"):
            large.rows()
        self.assertEqual(small.rows(), [[]])
        self.assertFalse(self.is_full())

    def test_one_that_is_larger_than_the_room_is_refused_and_smaller_ones_are_not(self):
        self.small_disk()
        committer = self.open()
        with self.assertRaisesRegex(linger.Full, "no room for this"):
            committer.run(self.adding(self.total))
        committer.run(self.adding(1000))

    def test_the_log_of_a_small_disk_stays_short(self):
        self.small_disk()
        committer = self.open()
        committer.run(self.adding(2_000_000))
        for n in range(200):
            self.run_sql(committer, linger.SET_CONFIG, key="k", value=str(n) * 2000)
        self.assertLess(os.stat(self.dbfile + "-wal").st_size, self.total // 5)

    def test_many_posts_at_once_leave_room_below_the_limit_for_takes(self):
        committer = self.open(max_size=2_000_000)
        operations = [self.adding(50_000, f"k{n}") for n in range(50)]
        self.run_together(committer, operations)
        size, free = self.store._measure()
        self.assertIn(size - free, range(1_500_000, 1_900_000))
        self.run_sql(committer, linger.SET_CONFIG, key="take", value="x" * 50_000)

    def test_a_file_is_allocated_where_the_system_has_no_call_for_it(self):
        for reason in (errno.EOPNOTSUPP, errno.EINVAL):
            refusing = unittest.mock.Mock(side_effect=OSError(reason, "no"))
            with open(self.folder / "file", "wb") as file:
                with unittest.mock.patch("os.posix_fallocate", refusing, create=True):
                    linger.allocate(file.fileno(), 0, 1_000_001)
                self.assertEqual(os.fstat(file.fileno()).st_size, 1_000_001)


class LogTest(Folder):
    """Whether a log belongs to the database that it lies beside."""

    def setUp(self):
        super().setUp()
        self.store = linger.Store(self.dbfile, "off")
        self.committer = linger.Committer(self.store)
        self.addCleanup(self.store.close)
        self.addCleanup(self.committer.close)
        self.copies = itertools.count()

    def test_damage_that_several_threads_find_is_logged_once(self):
        error = sqlite3.DatabaseError("database disk image is malformed")
        noted, ready, logged = [""], threading.Barrier(4), []
        slow = property(lambda _: (noted[-1], pause(0.01))[0], lambda _, text: noted.append(text))

        def find():
            ready.wait(PATIENCE)
            self.store._translate(error)

        damage = unittest.mock.patch.object(linger.Store, "_damage", slow)
        with damage, unittest.mock.patch.object(linger, "log", logged.append):
            for future in [self.thread(find) for _ in range(4)]:
                future.result(PATIENCE)
        self.assertEqual(len(logged), 1)

    def write(self, value):
        self.committer.run(linger.Operation((linger.SET_CONFIG,), {"key": "value", "value": value}))

    def checkpoint(self):
        """What another program may do at any time; the log begins anew with the next commit."""
        with contextlib.closing(sqlite3.connect(self.dbfile)) as connection:
            connection.execute("pragma wal_checkpoint(restart)").fetchall()

    def raw_copy(self):
        copy = str(self.folder / f"raw{next(self.copies)}")
        shutil.copy(self.dbfile, copy)
        return copy

    def sqlite_copy(self):
        copy = str(self.folder / f"copy{next(self.copies)}")
        target, source = sqlite3.connect(copy), sqlite3.connect(self.dbfile)
        with contextlib.closing(target), contextlib.closing(source):
            source.backup(target)
        return copy

    def crash(self, restored=None):
        """The files as a kill leaves them, in a folder of their own, after a restore."""
        path = str(self.folder / f"crash{next(self.copies)}.db")
        shutil.copy(restored or self.dbfile, path)
        shutil.copy(self.dbfile + "-wal", path + "-wal")
        return path

    def value(self, path):
        """What a start finds, which must be whole; and what it logs."""
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            store = stack.enter_context(contextlib.closing(linger.Store(path)))
            self.assertEqual(store.read("pragma integrity_check"), [[("ok",)]])
            ((row,),) = store.read(linger.GET_CONFIG, key="value")
        return row[0], log.getvalue()

    def check_restore(self, copy):
        """The copy is served as it was, and the log is kept under another name."""
        path = self.crash(copy)
        log = Path(path + "-wal").read_bytes()
        value, said = self.value(path)
        self.assertEqual(value, "old")
        self.assertRegex(said, r"^linger: .*-wal is not the log of .*-wal\.stale\n$")
        self.assertEqual(Path(path + "-wal.stale").read_bytes(), log)

    def copies_of_each_kind(self):
        copies = {"sqlite": self.sqlite_copy()}
        for name in ("backup", "vacuum"):
            copies[name] = str(self.folder / name)
        linger.create_file(copies["backup"])
        self.store.copy(copies["backup"])
        with contextlib.closing(sqlite3.connect(self.dbfile)) as connection:
            connection.execute("vacuum into ?", (copies["vacuum"],))
        return copies

    def test_the_log_of_a_killed_server_is_served(self):
        self.write("1")
        self.assertEqual(self.value(self.crash()), ("1", ""))
        self.checkpoint()
        for value in ("2", "3"):
            self.write(value)
            self.assertEqual(self.value(self.crash()), (value, ""))

    def test_a_log_that_was_written_back_in_part_is_served(self):
        self.write("1")
        with contextlib.closing(sqlite3.connect(self.dbfile)) as connection:
            connection.execute("begin")
            connection.execute("select * from config").fetchall()
            self.write("2")
            self.store._writer.execute("pragma wal_checkpoint(passive)").fetchall()
            self.write("3")
            self.assertEqual(self.value(self.crash()), ("3", ""))

    def test_a_page_that_a_power_failure_left_half_written_is_no_other_file(self):
        self.write("1")
        self.checkpoint()
        old = Path(self.raw_copy()).read_bytes()
        self.write("2" * 600)
        log = Path(self.dbfile + "-wal").read_bytes()
        page = log[32 + 24 :][:4096]
        at = (struct.unpack(">I", log[32:36])[0] - 1) * 4096
        self.assertNotEqual(old[at + 2048 : at + 4096], page[2048:])
        half = self.folder / "half"
        half.write_bytes(old[: at + 2048] + page[2048:] + old[at + 4096 :])
        self.assertEqual(self.value(self.crash(half)), ("2" * 600, ""))

    def test_a_file_copied_after_a_checkpoint_has_the_log_since_then(self):
        self.write("1")
        self.checkpoint()
        self.write("2")
        copy = self.raw_copy()
        self.write("3")
        self.assertEqual(self.value(self.crash(copy)), ("3", ""))

    def test_a_restored_backup_is_served_without_the_log_that_was_there(self):
        self.write("old")
        copies = self.copies_of_each_kind()
        self.write("new")
        for name, copy in copies.items():
            with self.subTest(name):
                self.check_restore(copy)

    def test_and_when_the_log_has_begun_anew_since(self):
        self.write("old")
        copies = self.copies_of_each_kind()
        self.checkpoint()
        copies["raw"] = self.raw_copy()
        for value in ("new", "newer"):
            self.write(value)
            self.checkpoint()
        self.write("newest")
        for name, copy in copies.items():
            with self.subTest(name):
                self.check_restore(copy)

    def test_a_newer_file_is_served_without_an_older_log(self):
        self.write("older")
        older = self.folder / "older-wal"
        shutil.copy(self.dbfile + "-wal", older)
        self.checkpoint()
        self.write("old")
        copy = self.sqlite_copy()
        shutil.copy(older, self.dbfile + "-wal")
        self.check_restore(copy)

    def test_the_log_of_another_database_is_not_replayed(self):
        self.write("alien")
        other = str(self.folder / "other.db")
        with contextlib.closing(linger.Store(other)) as store:
            operation = linger.Operation((linger.SET_CONFIG,), {"key": "value", "value": "old"})
            store.transact([operation])
        self.check_restore(other)

    def test_no_log_that_was_set_aside_is_overwritten(self):
        self.write("old")
        copy = self.sqlite_copy()
        self.write("new")
        path = self.crash(copy)
        Path(path + "-wal.stale").write_text("kept")
        self.assertIn("-wal.stale.2\n", self.value(path)[1])
        self.assertEqual(Path(path + "-wal.stale").read_text(), "kept")

    def test_a_log_that_sqlite_would_not_read_stops_no_start(self):
        self.write("1")
        self.checkpoint()
        for log in (b"", b"x", os.urandom(32), os.urandom(9_000), b"\xff" * 99):
            path = self.raw_copy()
            Path(path + "-wal").write_bytes(log)
            self.assertEqual(self.value(path), ("1", ""))

    def test_checkpoints_of_other_programs_and_new_times_are_no_alarm(self):
        for number in range(20):
            self.write(f"{number}" * 300)
            if number % 3 == 0:
                self.checkpoint()
            if number % 5 == 0:
                os.utime(self.dbfile)
            with contextlib.closing(sqlite3.connect(self.dbfile)) as connection, connection:
                connection.execute("insert or replace into config values ('other', random())")
        self.assertEqual(self.value(self.crash()), ("19" * 300, ""))

    def test_other_files_in_the_directory_ask_for_no_look_into_the_database(self):
        self.write("1")
        with unittest.mock.patch.object(linger.DatabaseFile, "is_own") as is_own:
            (self.folder / "other").touch()
            self.write("2")
        is_own.assert_not_called()

    def overwrite(self, copy):
        """Puts other content into the file in use; the errors that follow, and the log."""
        Path(self.dbfile).write_bytes(Path(copy).read_bytes())
        errors = []
        with contextlib.redirect_stderr(io.StringIO()) as log:
            for _ in range(3):
                with self.assertRaises(linger.Unavailable) as caught:
                    self.write("newer")
                errors.append(str(caught.exception))
            self.committer.close()
            self.store.close()
        self.assertEqual(log.getvalue(), f"linger: {errors[0]}\n")
        return set(errors)

    def test_a_file_overwritten_while_in_use_is_not_written_to(self):
        self.write("old")
        for name, copy in self.copies_of_each_kind().items():
            with self.subTest(name):
                self.write("new")
                (error,) = self.overwrite(copy)
                self.assertRegex(error, "overwritten while in use.* restart the server")
                self.assertEqual(Path(self.dbfile).read_bytes(), Path(copy).read_bytes())
                self.assertEqual(self.value(self.crash())[0], "old")
                self.dbfile = str(self.folder / f"{name}.db")
                self.store = linger.Store(self.dbfile)
                self.committer = linger.Committer(self.store)
        self.committer.close()
        self.store.close()

    def test_a_file_emptied_while_in_use_is_not_written_to(self):
        copy = self.folder / "copy"
        for size in (0, 1 << 20):
            with self.subTest(size):
                self.committer.close()
                self.store.close()
                self.dbfile = str(self.folder / f"{size}.db")
                self.store = linger.Store(self.dbfile)
                self.committer = linger.Committer(self.store)
                self.write("old")
                copy.write_bytes(bytes(size))
                (error,) = self.overwrite(copy)
                self.assertRegex(error, "overwritten while in use.* restart the server")
                self.assertEqual(Path(self.dbfile).read_bytes(), bytes(size))

    def test_a_malformed_database_takes_nothing_more(self):
        for code, text in ((11, "x"), (26 | 256, "y")):
            with self.subTest(code):
                error = sqlite3.DatabaseError(text)
                error.sqlite_errorcode = code
                self.assertTrue(linger.is_malformed(error))
        self.write("1")
        broken = self.raw_copy()
        with contextlib.closing(sqlite3.connect(broken)) as connection, connection:
            connection.execute("create table more as select zeroblob(3000) x from sqlite_master")
        with open(broken, "r+b") as file:
            file.seek(-8 * 4096, os.SEEK_END)  # of that table
            file.write(bytes(8 * 4096))
        with contextlib.redirect_stderr(io.StringIO()) as log:
            broker = linger.Broker(linger.Store(broken))
            self.addCleanup(broker.close)
            for call in (
                lambda: broker._committer.read("select * from more"),
                broker.check_health,
                lambda: broker.post("q", b"x"),
            ):
                with self.assertRaisesRegex(linger.Unavailable, "malformed.*README, Backup"):
                    call()
            broker.close()
        said = re.findall("(?m)^linger: the database is malformed", log.getvalue())
        self.assertEqual(len(said), 1)  # beside what the ticker says

    def test_what_is_malformed_is_known_before_python_3_11_too(self):
        for text in (
            "database disk image is malformed",
            "file is not a database",
            "malformed database schema (x)",
        ):
            self.assertTrue(linger.is_malformed(sqlite3.DatabaseError(text)))
        self.assertFalse(linger.is_malformed(sqlite3.OperationalError("disk I/O error")))

    def test_the_frames_are_the_same_however_many_are_read_at_once(self):
        for number in range(9):
            self.write(f"{number}" * 9_000)
        self.checkpoint()
        self.write("anew" * 9_000)  # over the first ones
        size = os.path.getsize(self.dbfile + "-wal")
        frames = []
        for at_once in (1, 2, 3, 100):
            self.hasten(FRAMES_AT_ONCE=at_once)
            log_file = linger.LogFile(self.dbfile)
            self.addCleanup(log_file.close)
            frames.append(list(log_file.frames()))
            self.assertEqual(list(log_file.frames()), [])
            self.write(f"more {at_once}")
            self.assertGreater(len(list(log_file.frames())), 0)
        first = len(frames[0])
        self.assertGreater(first, 5)
        self.assertLess(frames[0][-1][1] + log_file.page, size)
        for others in frames[1:]:
            self.assertEqual(others[:first], frames[0])

    def test_frames_written_again_after_a_rollback_are_no_overwritten_file(self):
        path = str(self.folder / "watched.db")
        linger.Store(path).close()
        file = linger.DatabaseFile(path)
        self.addCleanup(file.close)
        connection = sqlite3.connect(path, isolation_level=None)
        self.addCleanup(connection.close)
        for pragma in ("journal_mode = wal", "wal_autocheckpoint = 0", "cache_size = 2"):
            connection.execute(f"pragma {pragma}").fetchall()
        rows = connection.execute("select rootpage from sqlite_master where name = 'config'")
        change = "insert into config (key, value) values (?, hex(zeroblob(?)))"
        connection.execute(change, ("first", 1))
        connection.execute("begin")
        for number in range(50):  # more than the cache holds: written to the log at once
            connection.execute(change, (f"large {number}", 1_000))
        file.watch(rows.fetchone()[0])
        connection.execute("rollback")
        connection.execute(change, ("small", 1))
        connection.execute("pragma wal_checkpoint(full)").fetchall()
        self.assertTrue(file.is_own())


class LockTest(Folder):
    """One server for a database, whatever happens to its lock file."""

    def test_without_its_lock_file_and_by_another_name_it_is_still_one_database(self):
        with contextlib.closing(linger.Store(self.dbfile)) as store:
            for name in (os.link, os.symlink):
                name(self.dbfile, str(self.folder / name.__name__))
            os.unlink(self.dbfile + "-lock")
            paths = (self.dbfile, *(str(self.folder / name) for name in ("link", "symlink")))
            for path in paths:
                with self.assertRaisesRegex(linger.Unavailable, "in use by another", msg=path):
                    linger.Store(path)
            program = """
import linger, sys
for path in sys.argv[1:]:
    try:
        linger.Store(path)
    except linger.Unavailable as error:
        print("in use by another Linger" in str(error))
"""
            self.assertEqual(run_python(program, *paths).stdout, "True\n" * len(paths))
            store.transact([linger.Operation()])
        linger.Store(self.dbfile).close()

    def test_what_is_no_file_is_not_replaced_by_one(self):
        special = str(self.folder / "device")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(special)
        for path in (special, str(self.folder)):
            with self.assertRaisesRegex(linger.Unavailable, "is a directory or a device"):
                linger.Store(path)
            with self.assertRaises(linger.Conflict), linger.atomic_write(path, replace=True):
                pass
        self.assertEqual(os.listdir(self.folder), ["device"])


class LostTakeTest(Folder):
    """A power failure may undo takes that were not synced; no lease is given out twice."""

    def open(self, path):
        broker = linger.Broker(linger.Store(str(path)))
        self.addCleanup(broker.close)
        return broker

    def after_failure(self, path, size):
        """What a start finds if the log has kept so many bytes."""
        copy = Path(tempfile.mkdtemp(dir=self.folder)) / "q.db"
        shutil.copy(path, copy)
        Path(f"{copy}-wal").write_bytes(Path(f"{path}-wal").read_bytes()[:size])
        return copy, self.open(copy)

    def log_size(self, path):
        return os.path.getsize(f"{path}-wal")

    def test_the_log_may_end_with_any_frame_after_the_last_sync(self):
        path = self.folder / "q.db"
        broker = self.open(path)
        for n in range(2):
            broker.post("q", b"%d" % n)
        synced = self.log_size(path)
        given = {message.id: message.lease for message in (broker.get("q") for _ in range(2))}
        frame = linger.FRAME_HEADER + 4_096
        ends = range(synced, self.log_size(path) + 1, frame)
        self.assertGreaterEqual(len(ends), 4)
        for lost, end in enumerate(reversed(ends)):
            with self.subTest(frames_lost=lost):
                self.check(*self.after_failure(path, end), given)

    def check(self, path, broker, given):
        """All messages are there; those taken in vain get new leases, and so after the next."""
        self.assertEqual(broker._store.read("pragma integrity_check"), [[("ok",)]])
        counts, leases = broker.info("q"), given.copy()
        self.assertEqual(counts["ready"] + counts["in-flight"], len(given))
        for _ in range(2):
            synced = self.log_size(path)
            for message in iter(lambda broker=broker: broker.get("q"), None):
                self.assertGreater(message.lease, leases[message.id])
                with self.assertRaises(linger.Conflict):
                    broker.delete(message.id, leases[message.id])
                leases[message.id] = message.lease
            path, broker = self.after_failure(path, synced)

    def test_a_stop_in_order_keeps_the_leases(self):
        path = self.folder / "q.db"
        broker = self.open(path)
        broker.post("q", b"x")
        self.assertEqual(broker.get("q").lease, 1)
        broker.close()
        broker = self.open(path)
        broker.release(1)
        self.assertEqual(broker.get("q").lease, 2)


class BackupTest(Folder):
    """Copies of a database in use."""

    def setUp(self):
        super().setUp()
        self.broker = linger.Broker(linger.Store(self.dbfile, "off"))
        self.addCleanup(self.broker.close)
        self.copy = str(self.folder / "copy.db")

    def bodies(self, path):
        """The bodies of channel q in a copy, which must be a whole database of ours."""
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        with contextlib.closing(linger.Broker(linger.Store(path))) as broker:
            self.assertEqual(broker._committer.read("pragma integrity_check"), [[("ok",)]])
            return [message.body for message, _ in broker.list_messages("q", n=1000)]

    def test_a_copy_has_all_that_was_committed_and_is_a_database_to_start_from(self):
        for n in range(3):
            self.broker.post("q", b"%d" % n)
        self.broker.backup(self.copy)
        self.broker.post("q", b"later")
        self.assertEqual(os.listdir(self.folder).count("copy.db-wal"), 0)
        self.assertEqual(self.bodies(self.copy), [b"0", b"1", b"2"])

    def test_a_copy_of_what_is_in_memory_is_one_too(self):
        with contextlib.closing(linger.Broker(linger.Store())) as broker:
            broker.post("q", b"x")
            broker.backup(self.copy)
            with broker.open_copy() as file:
                self.assertEqual(file.read(15), b"SQLite format 3")
        self.assertEqual(self.bodies(self.copy), [b"x"])

    def test_a_copy_that_cannot_be_written_fails_with_a_reason(self):
        os.mkdir(self.broker._store.path + ".copy")
        memory = linger.Broker(linger.Store())
        self.addCleanup(memory.close)
        with unittest.mock.patch.object(tempfile, "tempdir", str(self.folder / "no")):
            for broker in (self.broker, memory):
                with self.assertRaisesRegex(linger.Unavailable, "cannot write a copy: .*"):
                    broker.open_copy()

    def test_a_copy_is_of_one_moment_and_ends_though_others_write_between_its_pages(self):
        self.broker.post_batch("q", [(b"%d" % n + b"x" * 4000, "x", {}) for n in range(100)])
        looks = []

        def post_more(*_):
            if len(looks) < 1000:  # else it would never end
                looks.append(self.broker.post("q", b"late").id)

        store = self.broker._store
        with unittest.mock.patch.object(linger, "BACKUP_PAGES", 10):
            store._check_open = post_more
            self.broker.backup(self.copy)
        self.assertIn(len(looks), range(5, 50))
        self.assertEqual(len(self.bodies(self.copy)), 100)
        self.assertEqual(self.broker.channel_stats("q")["ready"], 100 + len(looks))

    def test_no_file_is_overwritten_and_what_fails_leaves_none(self):
        Path(self.copy).write_text("mine")
        with self.assertRaisesRegex(linger.Conflict, "already"):
            self.broker.backup(self.copy)
        self.assertEqual(Path(self.copy).read_text(), "mine")
        for path in (self.folder / "no" / "such", f"{self.copy}/x", self.folder / ("x" * 252)):
            with self.assertRaisesRegex(linger.Unavailable, "cannot write .*: (No|File)"):
                self.broker.backup(str(path))
        other = str(self.folder / "other.db")
        much = unittest.mock.patch.multiple(linger, DISK_RESERVE=1 << 62, DISK_RESERVE_SHARE=1)
        with much, self.assertRaisesRegex(linger.Full, "no room"):
            self.broker.backup(other)
        self.assertEqual([n for n in os.listdir(self.folder) if "other" in n], [])

    def test_a_stop_ends_a_copy(self):
        self.broker._store._closed = True
        self.addCleanup(setattr, self.broker._store, "_closed", False)
        with self.assertRaisesRegex(linger.Unavailable, "stops"):
            self.broker.backup(self.copy)

    def test_the_half_copy_of_a_killed_server_goes_with_the_next_start(self):
        self.broker.close()
        Path(self.dbfile + ".copy").write_bytes(b"half")
        linger.Store(self.dbfile).close()
        self.assertFalse(os.path.exists(self.dbfile + ".copy"))


class TakeOverTest(Folder):
    """Databases of Linger 1.0.1."""

    def setUp(self):
        super().setUp()
        with contextlib.closing(sqlite3.connect(self.dbfile)) as connection:
            connection.executescript(V1_DATABASE)
        self.original = Path(self.dbfile).read_bytes()

    def change(self, sql):
        with contextlib.closing(sqlite3.connect(self.dbfile)) as connection:
            connection.executescript(sql)

    def open(self, now=None):
        broker = linger.Broker(linger.Store(self.dbfile), clock=FakeClock(now))
        self.addCleanup(broker.close)
        return broker

    def test_messages_are_kept_with_all_that_they_had(self):
        broker = self.open()
        taken = [broker.get("jobs") for _ in range(4)]
        self.assertEqual([message.id for message in taken], [2, 1, 4, 3])
        self.assertEqual([message.priority for message in taken], [-5, 0, 0, 3])
        self.assertEqual((taken[0].body, taken[0].type), (b'{"n": 1}', "application/json"))
        self.assertEqual(taken[0].timeout, 7)
        self.assertEqual(taken[2].body, "form text: ¡olé! 你好 😀".encode())
        self.assertEqual(taken[3].body, bytes(range(256)))
        self.assertEqual(broker.get("你好/käse").body, "grüße".encode())
        partly = broker.get("partly")
        self.assertEqual((partly.deliver, partly.delivered, partly.lease), (2, 2, 2))
        self.assertEqual(broker.get("keep").linger, 1_000_000_000)

    def test_messages_that_are_due_come_back_or_expire(self):
        broker = self.open()
        self.assertEqual((broker.get("late").id, broker.get("late")), (9, None))

    def test_hidden_messages_come_back_when_their_time_is_over(self):
        broker = self.open(now=2_695_450_787.3)
        self.assertIsNone(broker.get("hidden"))
        broker._clock.source.now += 0.1
        self.assertEqual(broker.get("hidden").delivered, 2)

    def test_a_wrong_clock_at_the_start_hides_nothing_and_lets_nothing_go(self):
        self.change("update messages set timeout = 30 where id = 5; ")
        self.change("update messages set linger = 60, purge = ts + 60 where id = 7")
        broker = self.open(now=100.0)  # in 1970
        clock = broker._clock.source
        clock.ahead = time.time()  # NTP
        self.assertIsNone(broker.get("hidden"))
        clock.now += 30
        self.assertEqual(broker.get("hidden").received, 30)
        self.assertEqual(broker.channel_stats("keep"), {"ready": 1, "hidden": 0})
        clock.now += 30
        self.assertEqual(broker.channel_stats("keep"), {"ready": 0, "hidden": 0})

    def test_a_message_of_a_clock_that_was_ahead_does_not_stay_hidden_for_years(self):
        self.change("update messages set ts = 9e9, show = 9e9 + 7, timeout = 7 where id = 5")
        broker = self.open()
        broker._clock.source.now += 7
        self.assertEqual(broker.get("hidden").received, 7)

    def test_subscriptions_and_the_servers_id_are_kept(self):
        broker = self.open()
        self.assertEqual(broker.id, "c1020c87aa4d43a9b744037aecdfaaae")
        self.assertEqual(broker.topics("sub-a"), ["news", "thema-ä"])
        self.assertEqual(broker.get("sub-a").topic, "news")
        published, _, _ = broker.publish("news", b"x")
        message = broker.get("sub-a")
        self.assertEqual(published["sub-a"], message.id)
        self.assertEqual(message[2:5] + message[7:9], (-2, 11, 4, 1_000_000_000, "news"))

    def test_what_a_touch_hid_can_still_be_touched(self):
        self.open().touch(12)

    def test_the_files_mode_is_kept(self):
        os.chmod(self.dbfile, 0o640)
        self.open()
        self.assertEqual(os.stat(self.dbfile).st_mode & 0o777, 0o640)

    def test_a_database_that_cannot_be_taken_over_is_left_as_it_is(self):
        with contextlib.closing(sqlite3.connect(self.dbfile)) as connection:
            connection.execute("update messages set priority = null")
            connection.commit()
        before = Path(self.dbfile).read_bytes()
        with self.assertRaises(linger.Unavailable):
            self.open()
        self.assertEqual(Path(self.dbfile).read_bytes(), before)
        self.assertEqual(
            sorted(path.name for path in self.folder.iterdir()), ["linger.db", "linger.db-lock"]
        )

    def test_ids_go_on_after_the_largest_ever_given(self):
        self.assertEqual(self.open().post("jobs", b"x").id, 20)

    def test_the_original_is_kept_beside(self):
        self.open()
        self.assertEqual(Path(self.dbfile + ".v1").read_bytes(), self.original)

    def test_an_earlier_copy_is_not_overwritten(self):
        Path(self.dbfile + ".v1").write_bytes(b"precious")
        self.open()
        self.assertEqual(Path(self.dbfile + ".v1").read_bytes(), b"precious")
        self.assertEqual(Path(self.dbfile + ".v1.2").read_bytes(), self.original)

    def test_a_start_that_was_killed_when_the_original_was_saved_is_made_again(self):
        os.link(self.dbfile, self.dbfile + ".v1")
        self.open()
        self.assertEqual(Path(self.dbfile + ".v1").read_bytes(), self.original)
        self.assertFalse(os.path.exists(self.dbfile + ".v1.2"))

    def test_a_migration_happens_once(self):
        self.open().close()
        self.open()
        self.assertFalse(os.path.exists(self.dbfile + ".v1.2"))


# -- Broker --------------------------------------------------------------------------------------


@functools.cache
def new_database():
    """The content of a new database, which takes longer to create than to copy."""
    with tempfile.TemporaryDirectory(prefix="linger-test-") as folder:
        path = Path(folder, "new.db")
        linger.Store(path, "off").close()
        return path.read_bytes()


class BrokerTest(Folder):
    def setUp(self):
        super().setUp()
        Path(self.dbfile).write_bytes(new_database())
        self.clock = FakeClock()
        self.broker = self.open()

    def open(self, path=None, max_size=0, **options):
        store = self.open_store(path or self.dbfile, max_size)
        broker = linger.Broker(store, clock=self.clock, **options)
        self.addCleanup(broker.close)
        return broker

    def open_store(self, path, max_size):
        return linger.Store(path, "off", max_size)

    def restart(self, **options):
        self.broker.close()
        self.broker = self.open(**options)
        return self.broker

    def hasten_ticks(self):
        """Lets the ticker look at the clocks all the time."""
        self.hasten(TICK_INTERVAL=0.01)
        self.restart()

    def bodies(self, channel, most=100):
        """Takes all that is ready."""
        taken = []
        while len(taken) < most and (message := self.broker.get(channel)):
            taken.append(message.body)
        return taken

    @contextlib.contextmanager
    def stopped_ticker(self):
        """Lets nothing become due but by calls."""
        with unittest.mock.patch.object(self.broker._state.timers, "is_stopping", lambda: False):
            self.broker._state.timers.stop()
            self.broker._state.timers.join()
            yield

    def park(self, channel, wait=PATIENCE, **options):
        """A consumer that waits, as a future of its message, once it does."""
        before = count_waiting(self.broker, channel)
        future = self.thread(lambda: self.broker.get(channel, wait, **options))
        until(lambda: count_waiting(self.broker, channel) > before)
        return future


class DeliveryTest(BrokerTest):
    def test_a_message_is_delivered_as_it_was_posted(self):
        body = bytes(range(256))
        id = self.broker.post("q", body, "image/x", priority=-3, timeout=9, deliver=4, linger=99).id
        self.clock.now += 2
        self.assertEqual(
            self.broker.get("q"),
            (id, "q", -3, 9, 4, 1, 2, 99, "", 1, "image/x", body, "", "", "", "", 0, "", "", "", 0,
             "", 0, ""),
        )  # fmt: skip

    def test_an_empty_channel_gives_none(self):
        self.assertIsNone(self.broker.get("q"))

    def test_order_is_first_in_first_out(self):
        for n in range(5):
            self.broker.post("q", b"%d" % n)
        self.assertEqual(self.bodies("q"), [b"0", b"1", b"2", b"3", b"4"])

    def test_lower_priority_numbers_go_first(self):
        for priority in (1, linger.MAX_INTEGER, -1, 0, linger.MIN_INTEGER):
            self.broker.post("q", str(priority).encode(), priority=priority)
        self.assertEqual(
            self.bodies("q"),
            [b"-9223372036854775808", b"-1", b"0", b"1", b"9223372036854775807"],
        )

    def test_channels_are_apart(self):
        self.broker.post("a", b"1")
        self.assertIsNone(self.broker.get("b"))

    def test_a_message_stays_hidden_until_its_timeout(self):
        self.broker.post("q", b"x", timeout=10)
        self.broker.get("q")
        self.clock.now += 9.9
        self.assertIsNone(self.broker.get("q"))
        self.clock.now += 0.1
        message = self.broker.get("q")
        self.assertEqual((message.delivered, message.lease), (2, 2))

    def test_a_message_that_comes_back_has_its_old_place(self):
        for body in (b"1", b"2", b"3"):
            self.broker.post("q", body, timeout=10)
        self.broker.get("q")
        self.clock.now += 10
        self.assertEqual(self.bodies("q"), [b"1", b"2", b"3"])

    def test_a_message_is_delivered_exactly_as_often_as_allowed(self):
        self.broker.post("q", b"x", timeout=1, deliver=3)
        deliveries = 0
        for _ in range(100):
            deliveries += self.broker.get("q") is not None
            self.clock.now += 0.1
        self.assertEqual(deliveries, 3)
        self.assertEqual(self.broker.stats()["current-messages"], 0)

    def test_a_message_is_never_delivered_once_its_lingering_is_over(self):
        self.broker.post("q", b"x", linger=5)
        self.clock.now += 5
        self.assertIsNone(self.broker.get("q"))
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 0})
        self.assertEqual(self.broker.counters["msg-retention"], 1)

    def test_lingering_does_not_end_a_delivery_under_way(self):
        id = self.broker.post("q", b"x", linger=5, timeout=10).id
        self.broker.get("q")
        self.clock.now += 9
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 1})
        self.broker.delete(id)

    def test_a_message_whose_lingering_ended_in_flight_does_not_come_back(self):
        self.broker.post("q", b"x", linger=5, timeout=10)
        self.broker.get("q")
        self.clock.now += 10
        self.assertIsNone(self.broker.get("q"))

    def test_an_expired_message_cannot_be_deleted(self):
        ids = [self.broker.post("q", b"x", linger=5).id for _ in range(4)]
        taken = self.broker.get("q")
        done = []
        self.clock.now += 5
        self.assertRaises(linger.NotFound, self.broker.delete, ids[1])
        id = self.broker.post("q", b"x", linger=5).id
        self.clock.now += 5
        self.broker.delete_async(done.append, id)
        until(lambda: done)
        self.assertRaises(linger.NotFound, done[0].result)
        id = self.broker.post("q", b"x", linger=5).id
        self.clock.now += 5
        self.assertEqual(self.broker.delete_batch([(id, None)]), ([], [], [id]))
        self.broker.delete(taken.id)  # one in flight does not expire

    def test_a_deleted_message_is_gone(self):
        id = self.broker.post("q", b"x", timeout=1).id
        self.broker.get("q")
        self.broker.delete(id)
        self.clock.now += 1
        self.assertIsNone(self.broker.get("q"))
        with self.assertRaises(linger.NotFound):
            self.broker.delete(id)

    def test_a_ready_message_can_be_deleted(self):
        self.broker.delete(self.broker.post("q", b"x").id)
        self.assertIsNone(self.broker.get("q"))

    def test_touch_restarts_the_timeout(self):
        id = self.broker.post("q", b"x", timeout=10).id
        self.broker.get("q")
        self.clock.now += 9
        self.broker.touch(id)
        self.clock.now += 9
        self.assertIsNone(self.broker.get("q"))
        self.clock.now += 1
        self.assertEqual(self.broker.get("q").delivered, 2)

    def test_touch_of_what_is_not_in_flight_is_a_conflict(self):
        id = self.broker.post("q", b"x").id
        with self.assertRaisesRegex(linger.Conflict, "not in flight"):
            self.broker.touch(id)
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 0})

    def test_touch_of_no_message_is_not_found(self):
        with self.assertRaises(linger.NotFound):
            self.broker.touch(77)

    def test_a_lost_lease_is_refused(self):
        id = self.broker.post("q", b"x", timeout=10).id
        first = self.broker.get("q").lease
        self.clock.now += 10
        second = self.broker.get("q").lease
        self.assertGreater(second, first)
        for call in (self.broker.touch, self.broker.delete):
            with self.assertRaisesRegex(linger.Conflict, "overtaken"):
                call(id, first)
        self.broker.touch(id, second)
        self.broker.delete(id, second)
        with self.assertRaises(linger.NotFound):
            self.broker.delete(id, second)

    def test_a_late_call_before_the_next_delivery_still_counts(self):
        id = self.broker.post("q", b"x", timeout=10).id
        lease = self.broker.get("q").lease
        self.clock.now += 11
        self.broker.touch(id, lease)
        self.assertIsNone(self.broker.get("q"))
        self.clock.now += 11
        self.broker.delete(id, lease)

    def test_an_undone_delivery_is_not_counted_and_its_lease_not_used_again(self):
        self.broker.post("q", b"x", deliver=1)
        consumer = self.broker.consumer(["q"])
        (first,) = taken = self.broker.take(consumer)
        self.broker.undo_take(consumer, taken)
        with self.assertRaises(linger.Conflict):
            self.broker.touch(first.id, first.lease)
        second = self.broker.get("q")
        self.assertEqual(second.delivered, 1)
        self.assertGreater(second.lease, first.lease)

    def test_undoing_a_delivery_that_was_overtaken_changes_nothing(self):
        self.broker.post("q", b"x", timeout=1)
        consumer = self.broker.consumer(["q"])
        taken = self.broker.take(consumer)
        self.clock.now += 1
        second = self.broker.get("q")
        self.broker.undo_take(consumer, taken)
        self.assertIsNone(self.broker.get("q"))
        self.broker.delete(second.id, second.lease)

    def test_drain_takes_all_away_but_subscriptions(self):
        self.broker.subscribe("q", "t")
        for _ in range(3):
            self.broker.post("q", b"x")
        self.broker.get("q")
        self.broker.post("other", b"x")
        self.broker.drain("q")
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 0})
        self.assertEqual(self.broker.channel_stats("other"), {"ready": 1, "hidden": 0})
        self.assertEqual(self.broker.topics("q"), ["t"])

    def test_an_expired_message_leaves_its_room_below_the_mark_to_a_post(self):
        self.broker.set_settings("q", hlm=1)
        with self.stopped_ticker():
            self.broker.post("q", b"1", linger=5)
            self.clock.now += 5
            self.broker.post("q", b"2")
        self.assertEqual(self.bodies("q"), [b"2"])

    def test_a_channel_at_its_mark_takes_no_more(self):
        self.restart(hlm=2)
        self.broker.post("q", b"1")
        self.broker.post("q", b"2")
        self.broker.get("q")
        with self.assertRaisesRegex(linger.Full, "high-level mark of 2"):
            self.broker.post("q", b"3")
        self.broker.post("other", b"1")
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 1})

    def test_ids_never_repeat_also_after_a_restart(self):
        id = self.broker.post("q", b"x").id
        self.broker.delete(id)
        self.restart()
        self.assertGreater(self.broker.post("q", b"x").id, id)

    def test_everything_is_there_after_a_restart(self):
        self.broker.post("q", b"1", timeout=10, deliver=2)
        self.broker.post("q", b"2", linger=20)
        self.broker.subscribe("q", "t", priority=-1)
        lease = self.broker.get("q").lease
        self.restart()
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 1})
        self.clock.now += 10
        message = self.broker.get("q")
        self.assertEqual((message.body, message.delivered), (b"1", 2))
        self.assertGreater(message.lease, lease)
        self.clock.now += 10
        self.assertIsNone(self.broker.get("q"))
        self.broker.publish("t", b"3")
        self.assertEqual(self.broker.get("q").priority, -1)

    def test_bad_messages_are_refused(self):
        with self.assertRaises(linger.BadRequest):
            self.broker.post("q", b"")
        with self.assertRaises(linger.TooLarge):
            self.broker.post("q", b"x" * (linger.MAX_MESSAGE + 1))
        for parameters in ({"timeout": 0}, {"deliver": -1}, {"linger": -1}, {"priority": 2**63}):
            name = next(iter(parameters))
            with self.subTest(name), self.assertRaisesRegex(linger.BadRequest, name):
                self.broker.post("q", b"x", **parameters)
        self.broker.post("q", b"x" * linger.MAX_MESSAGE)

    def test_names_are_text_without_control_characters(self):
        for name in ("x", "a/b", "ü" * 127, "日本", "a b", "%"):
            self.broker.post(name, b"x")
        self.assertEqual(len(self.broker.channels()), 6)
        for name in ("", "x" * 256, "ü" * 128, "a\nb", "\x7f", "\x9f", "\ud800", "\0"):
            with self.subTest(name), self.assertRaises(linger.BadRequest):
                self.broker.post(name, b"x")


YEAR, WEEK, DAY, HOUR = 31_536_000, 604_800, 86_400, 3_600


class TimeTest(BrokerTest):
    """Broker time: clocks that are wrong, are stepped or stand still, and suspends."""

    def furnish(self):
        """Stores one thing of each kind that ends some time."""
        self.furnished_at = self.clock.now
        self.broker.post("kept", b"x", linger=WEEK)
        self.later = self.broker.post("later", b"x", delay=DAY).id
        self.broker.post("flight", b"x", timeout=600)
        self.broker.get("flight")
        self.broker.pause("held", DAY)
        self.broker.post("once", b"x", dedup="k", dedup_for=DAY)

    def assert_intact(self):
        """What `furnish` stored is as it must be after less than 600 seconds."""
        broker, passed = self.broker, self.clock.now - self.furnished_at
        self.assertEqual(broker.channel_stats("kept"), {"ready": 1, "hidden": 0})
        self.assertAlmostEqual(broker.read_message(self.later)[0].delay, DAY - passed, delta=1)
        self.assertAlmostEqual(broker.read_message(self.later)[0].received, passed, delta=1)
        self.assertIsNone(broker.get("flight"))
        self.assertTrue(broker.info("held")["paused"])
        self.assertTrue(broker.post("once", b"x", dedup="k", dedup_for=DAY).duplicate)
        self.assert_prompt()

    def assert_prompt(self):
        """A delay, a timeout and a lingering of 2 seconds end after 2 seconds."""
        self.broker.post("a", b"x", delay=2)
        self.broker.post("b", b"x", timeout=2)
        self.broker.post("c", b"x", linger=2)
        self.broker.get("b")
        self.clock.now += 1.9
        self.assertEqual([self.broker.info(c)["ready"] for c in "abc"], [0, 0, 1])
        self.clock.now += 0.1
        self.assertEqual([self.broker.info(c)["ready"] for c in "abc"], [1, 1, 0])
        for channel in "ab":
            self.broker.drain(channel)

    def crash(self):
        """Goes on as after `kill -9`: with copies of the files, as they are at this moment."""
        copy = str(self.folder / f"copy-{len(list(self.folder.iterdir()))}.db")
        for suffix in ("", "-wal"):
            shutil.copy(self.broker._store.path + suffix, copy + suffix)
        self.broker.close()
        self.broker = self.open(copy)

    def recorded(self):
        """Broker time and wall time in the database."""
        ((value,),) = self.broker._store.read(linger.GET_CONFIG, key="time")[0]
        return tuple(map(float, value.split()))

    def test_a_start_in_1970_and_then_ntp_change_nothing(self):
        self.furnish()
        self.clock.ahead = 100 - self.clock.now
        self.restart()
        self.assert_intact()
        self.clock.ahead = 0
        self.assert_intact()
        for go_on in (self.restart, self.crash):
            go_on()
            self.assert_intact()

    def test_a_database_made_in_1970_goes_on_in_our_time(self):
        self.clock.ahead = 100 - self.clock.now
        self.broker = self.open(self.dbfile + ".2")
        self.furnish()
        self.clock.ahead = 0
        self.assert_intact()
        self.crash()
        self.assert_intact()

    def test_an_hour_back_and_forth_changes_nothing(self):
        self.furnish()
        for self.clock.ahead in (-HOUR, 0, HOUR, -HOUR, 0):
            self.broker.process_due()
            self.assert_intact()
        self.clock.ahead = -HOUR
        self.crash()
        self.assert_intact()

    def test_a_year_ahead_corrected_and_a_restart_change_nothing(self):
        for go_on in (self.restart, self.crash):
            self.clock.ahead = YEAR
            self.dbfile = str(self.folder / go_on.__name__)
            self.broker = self.open()
            self.furnish()
            self.clock.ahead = 0
            go_on()
            self.assert_intact()

    def test_a_restart_with_another_zero_of_elapsed_time_changes_nothing(self):
        self.furnish()
        self.broker.close()
        self.clock.now, self.clock.ahead = 100.0, self.clock.now - 100  # the machine was started
        self.furnished_at = 100.0
        self.broker = self.open()
        self.assert_intact()

    def test_the_time_for_which_no_server_ran_counts(self):
        self.furnish()
        self.broker.close()
        self.clock.now += 500
        self.broker = self.open()
        self.assert_intact()
        self.clock.now += 100
        self.assertEqual(self.broker.get("flight").delivered, 2)

    def test_a_clock_that_was_set_back_while_no_server_ran_hides_nothing_for_longer(self):
        self.broker.post("q", b"x", timeout=10)
        self.broker.get("q")
        self.broker.close()
        self.clock.ahead = -HOUR
        self.broker = self.open()
        self.clock.now += 10
        self.assertIsNotNone(self.broker.get("q"))

    def test_the_times_of_the_files_are_no_clock(self):
        self.furnish()
        self.broker.close()
        for moment in (time.time() + YEAR, 1000):
            for suffix in ("", "-lock"):
                os.utime(self.dbfile + suffix, (moment, moment))
            self.broker = self.open()
            self.assert_intact()
            self.broker.close()

    def test_elapsed_time_wakes_consumers_that_wait_also_after_a_suspend(self):
        self.hasten_ticks()
        self.broker.post("timeout", b"x", timeout=HOUR)
        self.broker.get("timeout")
        self.broker.post("delay", b"x", delay=HOUR)
        self.broker.pause("pause", HOUR)
        self.broker.post("pause", b"x")
        futures = [self.park(channel) for channel in ("timeout", "delay", "pause")]
        self.clock.now += HOUR
        for future in futures:
            self.assertIsNotNone(future.result(PATIENCE))

    def test_steps_wake_no_consumer_that_waits(self):
        self.broker.post("q", b"x", delay=10)
        future = self.park("q")
        for self.clock.ahead in (HOUR, -HOUR, YEAR, -time.time()):
            self.broker.process_due()
        self.assertFalse(future.done())
        self.clock.now += 10
        self.assertEqual(future.result(PATIENCE).body, b"x")

    def test_a_wall_clock_that_stands_still_holds_nothing_up(self):
        with unittest.mock.patch.object(time, "time", return_value=1e9):
            broker = linger.Broker(linger.Store())
            self.addCleanup(broker.close)
            broker.post("q", b"x", delay=1)
            start = time.monotonic()
            self.assertIsNotNone(broker.get("q", PATIENCE))
        self.assertAlmostEqual(time.monotonic() - start, 1, delta=0.5)

    def test_steps_during_load_bring_nothing_early_late_or_twice(self):
        self.furnish()
        steps = itertools.cycle((HOUR, -2 * HOUR, YEAR, -YEAR, 30, -90, 0.4, -time.time(), 0))
        future = self.thread(lambda: [self.broker.get("load", PATIENCE) for _ in range(50)])
        for n in range(50):
            self.clock.ahead = next(steps)
            self.broker.post("load", b"%d" % n, timeout=60, linger=600)
            self.broker.post("next", b"x", delay=1 + n % 3)
        bodies = [int(message.body) for message in future.result(PATIENCE)]
        self.assertEqual((bodies, self.broker.get("load")), (list(range(50)), None))
        self.assertEqual(self.broker.channel_stats("next"), {"ready": 0, "hidden": 50})
        self.assert_intact()
        self.crash()
        self.assert_intact()

    def test_a_wait_that_a_suspend_has_outlasted_ends(self):
        self.hasten_ticks()
        future = self.park("q", wait=HOUR - 10)
        self.clock.now += HOUR
        self.assertIsNone(future.result(PATIENCE))

    # -- the record

    def test_a_step_is_recorded_when_nobody_calls(self):
        self.hasten_ticks()
        self.furnish()
        self.clock.now += 2
        self.clock.ahead = YEAR
        until(lambda: self.recorded()[1] > self.clock.now + DAY)
        self.crash()
        self.assert_intact()

    def stop_ticker(self):
        self.broker._state.timers.stop()
        self.broker._state.timers.join()

    def test_a_step_is_recorded_with_the_next_commit(self):
        self.stop_ticker()
        self.broker.post("q", b"x")
        self.clock.now += 2
        self.clock.ahead = YEAR
        self.broker.post("q", b"x")
        self.assertEqual(self.recorded(), (self.clock.now, self.clock.now + YEAR))

    def test_time_is_recorded_each_minute_and_when_the_server_stops(self):
        self.hasten_ticks()
        self.broker.post("q", b"x")
        start = self.clock.now
        self.clock.now += 59
        self.broker.post("q", b"x")
        self.assertEqual(self.recorded()[0], start)
        self.clock.now += 1
        until(lambda: self.recorded()[0] == start + 60)  # by the ticker
        self.clock.now += 61
        self.broker.post("q", b"x")
        self.assertEqual(self.recorded()[0], start + 121)
        self.clock.now += 5
        self.broker.close()
        with contextlib.closing(sqlite3.connect(self.dbfile)) as connection:
            ((value,),) = connection.execute(linger.GET_CONFIG, {"key": "time"})
        self.assertEqual(float(value.split()[0]), start + 126)

    def test_a_server_in_which_nothing_is_stored_does_not_write(self):
        self.stop_ticker()
        start = self.clock.now
        self.clock.now += HOUR
        self.broker._committer.run(self.broker._clock.record(idle=True))
        self.clock.now += 1
        self.assertIsNone(self.broker._clock.record(idle=True))
        self.assertEqual(self.recorded()[0], start)
        self.broker.post("q", b"x")
        self.assertEqual(self.recorded()[0], start + HOUR + 1)

    def test_the_record_takes_no_commit_of_its_own(self):
        self.stop_ticker()
        self.clock.now += 61
        statements = []
        self.broker._store._writer.set_trace_callback(statements.append)
        self.broker.post("q", b"x")
        self.assertEqual(statements.count("commit"), 1)
        self.assertEqual(self.recorded()[0], self.clock.now)

    def test_a_record_that_cannot_be_written_harms_no_call_and_is_tried_again(self):
        self.clock.now += 61
        with unittest.mock.patch.object(linger, "RECORD_TIME", "insert into nowhere values (1)"):
            self.broker.post("q", b"x")
        self.assertLess(self.recorded()[0], self.clock.now)
        self.clock.now += 60
        self.broker.post("q", b"x")
        self.assertEqual(self.recorded()[0], self.clock.now)

    def test_a_long_time_between_two_runs_is_a_line_in_the_log(self):
        for days, lines in ((29, []), (31, ["31 days have passed"])):
            self.broker.close()
            self.clock.now += days * DAY
            log = io.StringIO()
            with contextlib.redirect_stderr(log):
                self.broker = self.open()
            self.assertEqual(re.findall(r"\d+ days have passed", log.getvalue()), lines)

    def test_an_endless_pause_is_a_finite_number_in_the_database(self):
        self.broker.pause("q")
        (((until,),),) = self.broker._store.read("select until from pauses")
        self.assertTrue(self.clock.now + 1e6 * YEAR < until < 2**53)
        self.clock.now += 1000 * YEAR
        self.restart()
        self.assertTrue(self.broker.info("q")["paused"])

    def test_the_start_is_shown_by_the_wall_clock_and_the_uptime_is_elapsed_time(self):
        start = int(self.clock.time())
        self.clock.now += 7
        self.clock.ahead = YEAR
        stats = self.broker.stats()
        self.assertEqual((stats["start"], stats["current-uptime"]), (start, 7))

    @unittest.skipUnless(hasattr(time, "CLOCK_BOOTTIME"), "needs Linux")
    def test_elapsed_time_counts_the_time_of_a_suspend(self):
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        now = linger.SYSTEM_CLOCK.monotonic()
        self.assertTrue(before <= now <= time.clock_gettime(time.CLOCK_BOOTTIME))


class TopicTest(BrokerTest):
    def test_each_subscriber_gets_a_copy_with_its_own_parameters(self):
        self.broker.subscribe("a", "t", priority=4, timeout=5, deliver=6, linger=7)
        self.broker.subscribe("b", "t")
        published, dropped, _ = self.broker.publish("t", b"news", "text/x")
        self.assertEqual(dropped, [])
        message = self.broker.get("a")
        self.assertEqual(message[:6], (published["a"], "a", 4, 5, 6, 1))
        self.assertEqual((message.linger, message.topic, message.lease), (7, "t", 1))
        self.assertEqual((message.type, message.body), ("text/x", b"news"))
        message = self.broker.get("b")
        self.assertEqual(message[:6], (published["b"], "b", 0, 30, 0, 1))
        self.assertEqual((message.linger, message.topic, message.lease), (0, "t", 1))

    def test_nobody_subscribed_gives_nothing(self):
        self.assertEqual(self.broker.publish("t", b"x"), ({}, [], False))
        self.broker.post("q", b"x")
        self.assertEqual(self.broker.publish("t", b"x"), ({}, [], False))

    def test_empty_and_too_large_are_refused_also_when_nobody_is_subscribed(self):
        with self.assertRaises(linger.BadRequest):
            self.broker.publish("t", b"")
        with self.assertRaises(linger.TooLarge):
            self.broker.publish("t", b"x" * (linger.MAX_MESSAGE + 1))

    def test_a_channel_at_its_mark_is_left_out(self):
        self.restart(hlm=1)
        for channel in "abc":
            self.broker.subscribe(channel, "t")
        self.broker.post("b", b"x")
        published, dropped, _ = self.broker.publish("t", b"y")
        self.assertEqual((sorted(published), dropped), (["a", "c"], ["b"]))
        self.assertEqual(self.broker.publish("t", b"y"), ({}, ["a", "b", "c"], False))

    def test_subscribing_again_replaces_the_parameters(self):
        self.broker.subscribe("a", "t", priority=4)
        self.broker.subscribe("a", "t", timeout=5)
        self.broker.publish("t", b"x")
        message = self.broker.get("a")
        self.assertEqual((message.priority, message.timeout), (0, 5))

    def test_lists_are_sorted(self):
        for channel in ("b", "a", "ä"):
            for topic in ("z", "y"):
                self.broker.subscribe(channel, topic)
        self.assertEqual(self.broker.channels(), ["a", "b", "ä"])
        self.assertEqual(self.broker.topics(), ["y", "z"])
        self.assertEqual(self.broker.topics("a"), ["y", "z"])
        self.assertEqual(self.broker.subscribers("z"), ["a", "b", "ä"])

    def test_an_ended_subscription_gets_nothing(self):
        self.broker.subscribe("a", "t")
        self.broker.unsubscribe("a", "t")
        self.broker.unsubscribe("a", "t")
        self.assertEqual(self.broker.publish("t", b"x"), ({}, [], False))
        self.assertEqual((self.broker.topics(), self.broker.channels()), ([], []))
        self.assertEqual(self.broker.counters["subscription-delete"], 1)

    def test_a_published_copy_lingers_as_its_subscription_says(self):
        self.broker.subscribe("a", "t", linger=5)
        self.broker.publish("t", b"x")
        self.clock.now += 5
        self.assertIsNone(self.broker.get("a"))


class WaitingTest(BrokerTest):
    CROWD = 2_000  # messages

    def test_a_post_is_handed_to_a_consumer_that_waits(self):
        future = self.park("q")
        id = self.broker.post("q", b"x").id
        self.assertEqual(future.result(PATIENCE).id, id)

    def test_consumers_are_served_in_the_order_in_which_they_came(self):
        futures = [self.park("q") for _ in range(5)]
        self.broker.subscribe("q", "t")
        ids = [self.broker.post("q", b"x").id for _ in range(4)]
        ids += self.broker.publish("t", b"x")[0].values()
        self.assertEqual([future.result(PATIENCE).id for future in futures], ids)

    def test_one_message_wakes_one_consumer(self):
        futures = [self.park("q") for _ in range(3)]
        self.broker.post("q", b"x")
        futures[0].result(PATIENCE)
        self.assertEqual(count_waiting(self.broker, "q"), 2)
        self.assertFalse(futures[1].done() or futures[2].done())
        self.broker.cancel_all()
        self.assertEqual([f.result(PATIENCE) for f in futures[1:]], [None, None])

    def test_of_a_batch_only_what_nobody_waits_for_is_counted_as_shown(self):
        self.broker.subscribe("q", "t")
        items = [(b"x", "text/plain", {})] * 3
        for shown, add in enumerate((self.broker.post_batch, self.broker.publish_batch)):
            waiting = self.park("q")
            add("qt"[shown], items)
            self.assertIsNotNone(waiting.result(PATIENCE))
            self.assertEqual(self.broker.counters["msg-show"], 2 + 2 * shown)
            self.broker.drain("q")

    def test_a_timed_out_message_is_handed_to_a_consumer_that_waits(self):
        self.broker.post("q", b"x", timeout=10)
        self.broker.get("q")
        future = self.park("q")
        self.clock.now += 10
        self.broker.process_due()
        self.assertEqual(future.result(PATIENCE).delivered, 2)

    def test_many_timed_out_messages_wake_as_many_consumers(self):
        for _ in range(3):
            self.broker.post("q", b"x", timeout=10)
            self.broker.get("q")
        futures = [self.park("q") for _ in range(4)]
        self.clock.now += 10
        self.broker.process_due()
        self.assertEqual([f.result(PATIENCE).id for f in futures[:3]], [1, 2, 3])
        self.assertFalse(futures[3].done())
        self.broker.post("q", b"y")
        self.assertEqual(futures[3].result(PATIENCE).body, b"y")

    def test_the_ticker_wakes_at_the_moment_when_a_message_is_due(self):
        broker = linger.Broker(linger.Store())
        self.addCleanup(broker.close)
        broker.post("q", b"x", timeout=1)
        broker.get("q")
        start = time.monotonic()
        self.assertIsNotNone(broker.get("q", 10))
        self.assertAlmostEqual(time.monotonic() - start, 1, delta=0.2)

    def test_a_wait_ends_in_time(self):
        broker = linger.Broker(linger.Store())
        self.addCleanup(broker.close)
        start = time.monotonic()
        self.assertIsNone(broker.get("q", 0.05))
        self.assertGreaterEqual(time.monotonic() - start, 0.05)
        self.assertEqual(count_waiting(broker), 0)

    def test_a_disconnected_consumer_is_passed_over(self):
        gone = threading.Event()
        is_disconnected = self.park("q", is_disconnected=gone.is_set)
        present = self.park("q")
        gone.set()
        id = self.broker.post("q", b"x").id
        self.assertEqual(present.result(PATIENCE).id, id)
        self.assertIsNone(is_disconnected.result(PATIENCE))

    def test_an_undone_delivery_goes_to_the_next_consumer(self):
        message_id = self.broker.post("q", b"x").id
        consumer = self.broker.consumer(["q"])
        taken = self.broker.take(consumer)
        future = self.park("q")
        self.broker.undo_take(consumer, taken)
        self.assertEqual(future.result(PATIENCE).id, message_id)
        self.assertEqual(future.result().delivered, 1)

    def test_a_canceled_consumer_gets_nothing(self):
        consumer = self.broker.consumer(["q"])
        future = self.thread(self.broker.take, consumer, PATIENCE)
        until(lambda: count_waiting(self.broker, "q"))
        self.broker.cancel(consumer)
        self.assertEqual(future.result(PATIENCE), [])
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 0})

    def take_async(self, *channels):
        """A consumer that waits, and the list of its finished operations."""
        done = []
        consumer = self.broker.consumer(channels)
        self.broker.take_async(done.append, consumer, wait=PATIENCE)
        return consumer, done

    def wake_for_nothing(self, channel, count, then=lambda: None):
        """Wakes consumers in a transaction that `then` fails, twice."""
        state, now, done = self.broker._state, self.broker.now(), queue.SimpleQueue()

        class Wakes(linger.Operation):
            def on_executed(self):
                state.wake(channel, count, now, join=True)
                then()
                raise linger.Unavailable("undone")

        wakes = Wakes()
        wakes.done_callback = done.put
        with contextlib.redirect_stderr(io.StringIO()):  # a cluster's commit is done, and logs it
            self.broker._committer.submit(wakes)
            done.get(timeout=PATIENCE)

    def test_a_consumer_that_found_nothing_waits_in_its_old_place(self):
        futures = [self.park("q") for _ in range(3)]
        for count in (2, 1, 3):
            self.wake_for_nothing("q", count)
            self.assertEqual(count_waiting(self.broker), 3)
        ids = [self.broker.post("q", b"x").id for _ in range(3)]
        self.assertEqual([future.result(PATIENCE).id for future in futures], ids)

    def test_a_consumer_that_is_canceled_while_it_is_woken_for_nothing_is_answered(self):
        consumer, done = self.take_async("q")
        until(lambda: consumer.waiting)
        self.wake_for_nothing("q", 1, lambda: self.broker.cancel(consumer))
        until(lambda: done)
        self.assertEqual([operation.result() for operation in done], [[]])

    def test_a_consumer_that_has_gone_is_answered_by_a_transaction_that_fails(self):
        consumer, done = self.take_async("q")
        until(lambda: consumer.waiting)
        consumer.is_disconnected = lambda: True
        self.wake_for_nothing("q", 1)
        until(lambda: done)
        self.assertEqual([operation.result() for operation in done], [[]])

    def test_a_publication_that_is_repeated_counts_who_is_woken_anew(self):
        self.broker.subscribe("q", "t")
        waiting, shown = self.park("q"), self.broker._state.counters["msg-show"]
        rows = [self.broker._new.published("t", body, "x/x", {}) for body in (b"1", b"2")]
        with busy(self.broker._committer):
            for operation in (linger.Publish(self.broker._state, rows), linger.Operation(("bad",))):
                self.broker._committer.submit(operation)
        self.assertEqual(waiting.result(PATIENCE).body, b"1")
        self.assertEqual(self.broker._state.counters["msg-show"] - shown, 1)

    def test_a_failed_take_wakes_the_next_consumer(self):
        consumer, done = self.take_async("q")
        second = self.park("q")
        consumer.n = 2**64  # more than SQLite can take
        self.broker.post("q", b"x")  # the shared transaction fails, then the take's own
        until(lambda: done)
        with self.assertRaises(OverflowError):
            done[0].result()
        self.assertEqual(second.result(PATIENCE).body, b"x")

    def test_a_consumer_is_asked_for_its_client_before_it_gets_a_message(self):
        def fail():
            raise ZeroDivisionError

        for is_disconnected, error in (
            (fail, ZeroDivisionError),
            (lambda: self.broker.stats(), RuntimeError),  # would wait for its own thread
        ):
            first, second = self.park("q", is_disconnected=is_disconnected), self.park("q")
            self.broker.post("q", b"x")
            self.assertRaises(error, first.result, PATIENCE)
            self.broker.delete(second.result(PATIENCE).id)

    def test_a_callback_that_makes_a_blocking_call_gets_an_error_and_not_a_deadlock(self):
        errors = []

        def call_again(_):
            for call in (
                lambda: self.broker.post("p", b"x"),
                lambda: self.broker.get("q"),
                lambda: self.broker.delete(1),
                lambda: self.broker.get("q", PATIENCE),
                self.broker.close,
            ):
                try:
                    call()
                except RuntimeError:
                    errors.append(call)

        self.broker.post_async(call_again, "q", b"x")
        until(lambda: len(errors) == 5)
        self.assertEqual(self.broker.get("q").delivered, 1)

    def test_a_clock_that_fails_loses_no_consumer(self):
        future = self.park("q")
        failing = unittest.mock.patch.object(self.clock, "monotonic", side_effect=ZeroDivisionError)
        with failing, self.assertRaises(ZeroDivisionError):
            self.broker.post("q", b"x")
        _, canceled = self.take_async("p")
        with busy(self.broker._committer):
            self.broker.post_async(lambda _: None, "q", b"y")
            failing.start()
        self.addCleanup(failing.stop)
        with contextlib.redirect_stderr(io.StringIO()):  # of the ticker
            self.assertEqual(future.result(PATIENCE).body, b"y")
            self.broker.cancel_all()
            self.assertEqual(canceled[0].result(), [])
            self.broker._state.timers.join()

    def commits_of(self, call):
        """How many commits a call takes."""
        statements = []
        writer = self.broker._store._writer
        writer.set_trace_callback(statements.append)
        call()
        writer.set_trace_callback(None)
        return statements.count("commit")

    def test_a_waiting_consumer_takes_a_message_in_the_transaction_that_adds_it(self):
        self.broker.subscribe("a", "t")
        self.broker.subscribe("b", "t")
        two = [(b"1", "x/y", {}), (b"2", "x/y", {})]
        for call, channels in (
            (lambda: self.broker.post("a", b"1"), "a"),
            (lambda: self.broker.post("a", b"1", unique="k"), "a"),
            (lambda: self.broker.post_batch("a", two), "aa"),
            (lambda: self.broker.publish("t", b"1"), "ab"),
            (lambda: self.broker.publish_batch("t", two), "aabb"),
        ):
            futures = [self.park(channel) for channel in channels]
            before = self.broker.counters["msg-show"]
            self.assertEqual(self.commits_of(call), 1, channels)
            for future in futures:
                message = future.result(PATIENCE)
                self.assertEqual(message.delivered, 1)
                self.broker.delete(message.id)
            self.assertEqual(self.broker.counters["msg-show"], before)

    def test_a_consumer_that_begins_to_wait_in_the_transaction_of_a_post_is_woken_after_it(self):
        with busy(self.broker._committer):
            _, done = self.take_async("q")
            self.broker.post_async(lambda _: None, "q", b"x")
        until(lambda: done)
        self.assertEqual([m.body for m in done[0].result()], [b"x"])

    def test_all_that_begin_to_wait_in_the_transaction_of_a_batch_are_woken_after_it(self):
        two = [(b"1", "x/y", {}), (b"2", "x/y", {})]
        broker = self.broker
        broker.subscribe("q", "q")
        for add in (broker.post_batch, broker.publish_batch):
            broker._check_copies = lambda *_: None  # which reads, and so waits for the committer
            with self.stopped_ticker(), busy(broker._committer):
                takes = [self.take_async("q")[1] for _ in two]
                adding = self.thread(add, "q", two)
                until(lambda: len(broker._committer._pending) == 3)
            adding.result(PATIENCE)
            until(lambda t=takes: all(t))
            messages = [m for done in takes for m in done[0].result()]
            self.assertEqual([m.body for m in messages], [b"1", b"2"])
            for message in messages:
                broker.delete(message.id)

    def test_a_message_without_a_waiting_consumer_is_counted_as_shown(self):
        two = [(b"1", "x/y", {}), (b"2", "x/y", {})]
        self.broker.subscribe("q", "t")
        self.broker.post("q", b"0")
        self.broker.post_batch("q", two)
        self.broker.publish_batch("t", two)
        self.assertEqual(self.broker.counters["msg-show"], 5)
        self.assertEqual(self.broker.counters["publish"], 2)

    def test_a_consumer_woken_in_a_transaction_that_fails_is_served_in_the_next(self):
        future = self.park("q")
        with busy(self.broker._committer):
            self.broker.post_async(lambda _: None, "q", b"x")
            self.broker._committer.submit(linger.Operation(("select * from nowhere",)))
        self.assertEqual(future.result(PATIENCE).body, b"x")

    def test_a_consumer_woken_by_an_operation_that_is_undone_waits_on(self):
        future = self.park("q")
        self.wake_for_nothing("q", 1)
        self.assertFalse(future.done())
        self.broker.post("q", b"y")
        self.assertEqual(future.result(PATIENCE).body, b"y")

    def test_no_wake_up_is_lost_in_a_crowd(self):
        total, taken = self.CROWD, []

        def consume(_):
            while (message := self.broker.get("q", PATIENCE)).body != b"end":
                taken.append(message.id)
                self.broker.delete(message.id)

        def produce(_):
            for _ in range(total // 4):
                self.broker.post("q", b"x")

        with ThreadPoolExecutor(12) as pool:
            consumers = [pool.submit(consume, n) for n in range(8)]
            list(pool.map(produce, range(4)))
            for _ in consumers:
                self.broker.post("q", b"end", priority=1)
            for consumer in consumers:
                consumer.result(PATIENCE)
        self.assertEqual(len(taken), total)
        self.assertEqual(len(set(taken)), total)

    def test_an_interrupted_consumer_leaves_no_trace(self):
        signal.signal(signal.SIGUSR1, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGUSR1, signal.SIG_DFL)

        main = threading.main_thread().ident

        def interrupt():
            until(lambda: count_waiting(self.broker, "q"))
            until(lambda: sys._current_frames()[main].f_code is linger.Broker.take.__code__)
            signal.pthread_kill(main, signal.SIGUSR1)

        self.thread(interrupt)
        with self.assertRaises(KeyboardInterrupt):
            self.broker.get("q", PATIENCE)
        self.assertEqual(count_waiting(self.broker), 0)
        self.broker.post("q", b"x")
        self.assertEqual(self.broker.get("q").delivered, 1)

    def test_the_ticker_survives_errors_also_when_they_cannot_be_logged(self):
        self.hasten(TICKER_RETRY_DELAY=0.001)
        future = self.park("q")
        self.broker.post("q", b"x", delay=10)
        self.broker.post("later", b"x", delay=20)
        failing = unittest.mock.patch.object(self.clock, "monotonic", side_effect=ZeroDivisionError)
        with unittest.mock.patch("sys.stderr", open(os.devnull)):  # not writable
            self.addCleanup(sys.stderr.close)
            with failing as monotonic:
                self.broker._state.timers.schedule(linger.ALL, 0.0)  # wakes the ticker
                until(lambda: monotonic.call_count > 2)
                self.clock.now += 10
            self.assertEqual(future.result(PATIENCE).body, b"x")
        self.broker.check_health()

    def test_a_ticker_that_has_died_is_noticed_by_the_health_check(self):
        self.broker.check_health()
        with unittest.mock.patch.object(self.clock, "monotonic", side_effect=SystemExit):
            self.broker._state.timers.schedule(linger.ALL, 0.0)  # wakes the ticker
            until(lambda: not self.broker._state.timers.is_alive())
        with self.assertRaisesRegex(linger.Unavailable, "ticker has stopped"):
            self.broker.check_health()

    def test_no_consumer_waits_once_the_broker_stops(self):
        future = self.park("q")
        self.broker.cancel_all()
        self.assertIsNone(future.result(PATIENCE))
        self.assertIsNone(self.broker.get("q", PATIENCE))

    def test_what_another_thread_is_about_to_process_is_no_failure(self):
        self.broker.post("q", b"x", delay=5)
        state, self.clock.now = self.broker._state, self.clock.now + 6
        piece = linger.ProcessDue(state, "q", self.clock.now, 1)
        state.processing["q"] = piece
        self.broker.process_due(0)
        state.committer.submit(piece)
        self.assertEqual(self.broker.get("q").body, b"x")


class InterruptTest(Folder):
    """Signals whose handlers raise, in a program that embeds a broker."""

    PROGRAM = """
import faulthandler, linger, os, random, signal, sys, threading, time

faulthandler.dump_traceback_later(15, exit=True)  # where its threads hang
linger.TICK_INTERVAL = linger.WAIT_CHECK_INTERVAL = 0.05

class Interrupt(BaseException):
    pass

def interrupt(_, frame):
    if not is_over and frame.f_globals["__name__"] in ("linger", "threading"):
        raise Interrupt

broker = linger.Broker(linger.Store(sys.argv[1], "off"))
stop = threading.Event()
is_over = False

def work():
    while not stop.is_set():
        broker.post("other", b"x")
        broker.delete(broker.get("other", 20).id)

worker = threading.Thread(target=work)
worker.start()
chance, interrupts, ids = random.Random(int(sys.argv[2])), 0, []
calls = (
    lambda: ids.append(broker.post("q", b"x").id),
    lambda: broker.get("q", chance.choice((0, 0.001, 0.1))),
    lambda: ids and broker.delete(ids.pop()),
    lambda: broker.channels(),
)
signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
end = time.monotonic() + 0.2
while time.monotonic() < end or interrupts < 6:
    try:
        chance.choice(calls)()
    except Interrupt:
        interrupts += 1
    except linger.NotFound:
        pass
is_over = True  # also for a signal that is on its way
signal.setitimer(signal.ITIMER_REAL, 0)
stop.set()
worker.join()
id = broker.post("last", b"x").id
assert broker.get("last").id == id
# The ticker ends a wait that was interrupted twice, which nobody cleans up, when its time is over.
deadline = time.monotonic() + 10
while broker.info("q")["waiting"]:
    assert time.monotonic() < deadline
while broker.take(broker.consumer(["q"], 100)):
    pass
broker.check_health()
broker.close()
faulthandler.cancel_dump_traceback_later()  # which has a thread
# Python 3.9 crashes if it exits while a thread (of the clean-up) has not quite begun.
while os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) > 1:
    assert time.monotonic() < deadline
"""

    def test_a_storm_of_interrupts_leaves_a_broker_that_works(self):
        def storm(number):
            dbfile = str(self.folder / f"{number}.db")
            return run_python(self.PROGRAM, dbfile, str(number))

        with ThreadPoolExecutor(2) as pool:
            for ended in pool.map(storm, range(8)):
                self.assertEqual((ended.returncode, ended.stderr), (0, ""))


class Interrupt(BaseException):
    """What a signal handler raises."""


def is_interrupted(call, step):
    """Whether an exception that is raised in linger.py before opcode number `step` ends a call."""
    left = step

    def trace(frame, event, _):
        nonlocal left
        if frame.f_globals is not vars(linger):
            return None
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if left < 0:
            raise Interrupt  # this ends the tracing
        return trace

    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


class InterruptedCallTest(BrokerTest):
    """A signal handler that raises, at any step of a call."""

    def interrupt_each_step(self, call, check=lambda: None):
        steps = itertools.takewhile(lambda step: is_interrupted(call, step), itertools.count())
        count = sum(check() is None for _ in steps)
        self.assertGreater(count, 20)

    def assert_no_lock_held(self, owner, call):
        def check():
            with self.assertRaises(RuntimeError):
                owner._lock.release()

        self.interrupt_each_step(call, check)

    def test_no_lock_of_a_broker_stays_locked(self):
        state, waits, history = self.broker._state, self.broker.calls._waits, linger.History(0)
        self.broker.post("q", b"x", delay=9)
        self.clock.now += 10
        self.assert_no_lock_held(state.timers, lambda: state.timers.due_channels(2e12))
        self.assert_no_lock_held(state.timers, lambda: state.timers.set_next("q", 1e12))
        self.assert_no_lock_held(state.waiting, lambda: state.waiting.counts())
        self.assert_no_lock_held(state.events, state.events.by_channel)
        self.assert_no_lock_held(state.queue_times, state.queue_times.fold)
        self.assert_no_lock_held(history, lambda: history.since(0))
        self.assert_no_lock_held(history, lambda: history.add(0, [], 0, 0))
        self.assert_no_lock_held(waits, lambda: waits.notify("key"))
        self.assert_no_lock_held(waits, lambda: waits._add("key", queue.SimpleQueue(), -1))

    def test_no_lock_of_a_client_stays_locked(self):
        client, deadlines = linger.Client(), linger._Deliveries()
        self.addCleanup(client.close)
        connection = client._transport.new_connection()
        self.assert_no_lock_held(client._transport, lambda: client._transport._register(connection))
        self.assert_no_lock_held(client._transport, client._transport._end)
        self.assert_no_lock_held(deadlines, lambda: deadlines.discard(1, None))

    def test_an_interrupted_look_at_what_is_due_loses_nothing(self):
        timers, names = self.broker._state.timers, [f"q{n}" for n in range(9)]
        for number, name in enumerate(names):
            timers.set_next(name, 2e12 - number)
            timers.set_next(name, 1e12 + number)
        check = lambda: self.assertEqual(timers.due_channels(3e12), names)  # noqa: E731
        self.interrupt_each_step(lambda: timers.due_channels(3e12), check)
        self.assertEqual(timers.due_channels(1e12 + 4), names[:5])
        self.hasten(MAX_DUE_CHANNELS=2)
        self.assertEqual(timers.due_channels(3e12), names[:2])

    def test_an_interrupted_end_of_a_wait_can_be_repeated(self):
        waiting, consumers = self.broker._state.waiting, []

        def cancel():
            self.assertTrue(waiting.cancel(consumers[-1], 0))

        def check():
            for consumer in consumers:
                waiting.pop("q", 0)
                waiting.cancel(consumer, 0)
            self.assertEqual((waiting.count("q"), waiting.channels(0)), (0, {"q"}))
            consumers.append(self.broker.consumer(["q"]))
            waiting.add(consumers[-1])

        consumers.append(self.broker.consumer(["q"]))
        waiting.add(consumers[-1])
        self.interrupt_each_step(cancel, check)


class BulkTest(BrokerTest):
    """Work that touches many rows is done in pieces, and other calls find room between them."""

    def setUp(self):
        super().setUp()
        self.hasten(PIECE_ROWS=4, FIRST_PIECE=4, PIECE_TIME=3600.0)
        self.broker._state.due_piece.rows = 4

    def fill(self, channel, count, **parameters):
        rows = [(b"%d" % n, "text/plain", parameters) for n in range(count)]
        return self.broker.post_batch(channel, rows)

    def pieces(self, call):
        """The kinds of operations of a call, and those of a post from another thread that begins
        with the first piece, in the order of their ends."""
        kinds, posted = [], []
        transact = self.broker._store.transact

        def spy(batch):
            if not posted:
                done = lambda operation: kinds.append(type(operation).__name__)  # noqa: E731
                posted.append(self.broker.post_async(done, "other", b"x"))
            late = transact(batch)
            kinds.extend(type(o).__name__ for o in batch if o.is_bulk)
            return late

        with unittest.mock.patch.object(self.broker._store, "transact", spy):
            call()
        return kinds

    def test_a_drain_works_in_pieces_and_lets_a_post_through(self):
        self.fill("q", 20)
        self.fill("q", 9, delay=60)
        kinds = self.pieces(lambda: self.broker.drain("q"))
        self.assertGreater(kinds.count("Drain"), 9)
        self.assertLess(kinds.index("Post"), 3)
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 0})
        self.assertEqual(self.broker.counters["channel-drain"], 1)

    def during_second_piece(self, kind, call, meanwhile):
        """Does something in another thread before the second piece of a call."""
        count = 0

        def create(*arguments):
            nonlocal count
            count += 1
            if count == 2:
                meanwhile()
            return original(*arguments)

        original = getattr(linger, kind)
        with unittest.mock.patch.object(linger, kind, create):
            return call()

    def test_a_drain_deletes_what_was_there_and_not_what_comes_meanwhile(self):
        self.fill("q", 10)
        late = []
        self.during_second_piece(
            "Drain",
            lambda: self.broker.drain("q"),
            lambda: late.append(self.broker.post("q", b"late", priority=-1, dedup="k").id),
        )
        self.assertEqual([m.id for m, _ in self.broker.list_messages("q")], late)
        self.assertTrue(self.broker.post("q", b"late", dedup="k").duplicate)

    def test_a_drain_ends_although_messages_come_by_moves_all_the_time(self):
        self.fill("dead", 100)
        self.fill("q", 10)
        original = linger.Drain

        def create(*arguments):
            self.broker.redrive("dead", 4, "q")
            return original(*arguments)

        with unittest.mock.patch.object(linger, "Drain", create):
            self.broker.drain("q")
        self.assertGreater(self.broker.channel_stats("dead")["ready"], 50)

    def test_a_drain_deletes_more_keys_than_messages(self):
        for n in range(10):
            self.broker.delete(self.broker.post("q", b"x", dedup=f"{n}").id)
        self.fill("q", 3)
        self.broker.drain("q")
        self.assertFalse(
            any(self.broker.post("q", b"x", dedup=f"{n}").duplicate for n in range(10))
        )

    def test_a_redrive_moves_in_order_what_was_ready_when_it_began(self):
        for n in range(23):
            self.broker.post("q", b"%d" % n, priority=-n % 3, dead="d", deliver=1)
        order = self.take_and_reject(23)
        late = []
        moved = self.during_second_piece(
            "Redrive",
            lambda: self.broker.redrive("d", to="q"),
            lambda: late.append(self.broker.post("d", b"late", priority=9).id),
        )
        self.assertEqual(moved, 23)
        self.assertEqual(self.bodies("q"), order)
        self.assertEqual([m.id for m, _ in self.broker.list_messages("d")], late)

    def take_and_reject(self, count):
        bodies = []
        for _ in range(count):
            message = self.broker.get("q")
            bodies.append(message.body)
            self.broker.reject(message.id, message.lease)
        return bodies

    def test_a_redrive_moves_no_more_than_asked_and_passes_over_what_is_not_dead(self):
        self.fill("d", 9, priority=-1)
        self.fill("q", 9, dead="d")
        self.take_and_reject(9)
        self.assertEqual(self.broker.redrive("d", 6), 6)
        self.assertEqual(self.bodies("q"), [b"%d" % n for n in range(6)])
        self.assertEqual(self.broker.redrive("d"), 3)
        self.assertEqual(self.broker.channel_stats("d")["ready"], 9)

    def test_an_error_after_some_pieces_says_how_many_were_done(self):
        self.fill("q", 20)
        original = self.broker._store.transact
        failing = unittest.mock.Mock(side_effect=[None, None, linger.Unavailable("no disk")])

        def transact(batch):
            if any(type(operation) is linger.Drain for operation in batch):
                failing()
            return original(batch)

        with unittest.mock.patch.object(self.broker._store, "transact", transact):
            failing.side_effect = [None, None, *[linger.Unavailable("no disk")] * 2]
            with self.assertRaisesRegex(
                linger.Unavailable, "only 4 messages were deleted.*no disk"
            ):
                self.broker.drain("q")
        self.assertEqual(self.broker.channel_stats("q")["ready"], 16)

    def test_pieces_become_smaller_when_they_take_long_and_grow_again(self):
        size = linger.PieceSize(4)
        size.adapt(3601.0, is_full=True)
        self.assertEqual(size.rows, 2)
        size.adapt(0.0, is_full=False)
        self.assertEqual(size.rows, 2)
        size.adapt(0.0, is_full=True)
        size.adapt(0.0, is_full=True)
        self.assertEqual(size.rows, 4)

    def test_what_is_due_at_once_is_processed_in_pieces_and_each_once(self):
        self.fill("q", 40, delay=10)
        self.clock.now += 10
        kinds = self.pieces(self.broker.process_due)
        self.assertGreater(kinds.count("ProcessDue"), 15)
        self.assertLess(kinds.index("Post"), 4)
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 40, "hidden": 0})
        self.assertEqual(self.broker.counters["msg-show"], 41)

    def test_many_calls_that_see_something_due_process_it_once(self):
        self.fill("q", 2, delay=10)
        with self.stopped_ticker():
            self.clock.now += 10
            operations = []
            with busy(self.broker._committer):
                for _ in range(20):
                    self.broker.post_async(operations.append, "p", b"x")
                    self.broker.delete_async(operations.append, 1)
                pending = list(self.broker._committer._pending)
            kinds = [type(operation).__name__ for operation in pending]
            self.assertEqual(kinds.count("ProcessDue"), 1)

    def test_a_take_sees_what_is_due_in_its_channel_beside_a_backlog_in_another(self):
        self.fill("bulk", 100, delay=10)
        first = self.broker.post("q", b"late", delay=9, priority=1).id
        second = self.broker.post("q", b"urgent", delay=10, priority=-1).id
        with self.stopped_ticker():
            self.clock.now += 10
            self.assertEqual(self.broker.get("q").id, second)
            self.assertEqual(self.broker.get("q").id, first)
            self.assertGreater(self.broker.channel_stats("bulk")["hidden"], 80)

    def test_takes_of_a_channel_with_a_backlog_get_all_of_it_in_order(self):
        self.fill("q", 40, delay=10)
        with self.stopped_ticker():
            self.clock.now += 10
            self.assertEqual(self.bodies("q"), [b"%d" % n for n in range(40)])

    def test_no_take_gets_what_has_expired_or_was_delivered_too_often(self):
        """Also when more of it has ended than was processed."""
        self.fill("q", 30, timeout=10, deliver=1)
        self.assertEqual(len(self.broker.take(self.broker.consumer(["q"], 30))), 30)
        self.fill("q", 30, linger=10)
        with self.stopped_ticker():
            self.clock.now += 10
            last = self.broker.post("q", b"alive").id
            self.assertEqual(self.broker.get("q").id, last)
            self.assertIsNone(self.broker.get("q"))
            self.assertIsNone(self.broker.get("q", auto=True))

    def test_a_take_finds_a_message_behind_many_that_have_expired(self):
        self.hasten(MAX_EXPIRED=3)
        self.fill("q", 30, linger=10)
        last = self.broker.post("q", b"alive", priority=1).id
        with self.stopped_ticker():
            self.clock.now += 10
            self.assertEqual(self.broker.get("q").id, last)

    def test_a_take_does_not_try_for_ever_when_nothing_can_be_processed(self):
        self.hasten(MAX_EXPIRED=3)
        self.fill("q", 30, linger=10)
        self.broker.post("q", b"alive", priority=1)
        with self.stopped_ticker():
            self.clock.now += 10
            self.broker.channel_stats("q")
            original = self.broker._store.transact

            def transact(batch):
                if any(type(operation) is linger.ProcessDue for operation in batch):
                    raise linger.Full("the disk is full")
                return original(batch)

            with unittest.mock.patch.object(self.broker._store, "transact", transact):
                self.assertIsNone(self.broker.get("q"))

    def test_a_consumer_waits_for_a_message_behind_many_that_have_expired(self):
        self.hasten(MAX_EXPIRED=1)
        self.hasten_ticks()
        self.fill("q", 60, linger=10)
        self.broker.post("q", b"alive", priority=1)
        self.clock.now += 10
        self.assertEqual(self.broker.get("q", PATIENCE).body, b"alive")

    def test_consumers_that_wait_so_are_woken_after_each_piece_and_all_at_the_end(self):
        self.hasten(MAX_EXPIRED=1)
        self.fill("q", 6, linger=9)
        self.fill("q", 3, priority=1)
        self.fill("q", 20, linger=10, priority=2)
        with self.stopped_ticker():
            self.clock.now += 10
            got = []
            for _ in range(3):
                self.broker.take_async(got.append, self.broker.consumer(["q"]), True)
            until(lambda: got or not self.broker.channel_stats("q")["ready"])
            self.assertGreater(self.broker.channel_stats("q")["ready"], 3)
            self.broker.process_due()
            until(lambda: len(got) == 3)

    def test_a_timed_out_message_beyond_the_piece_keeps_its_backoff(self):
        self.fill("q", 9, timeout=10, backoff="100")
        self.broker.take(self.broker.consumer(["q"], 9))
        self.clock.now += 10
        self.broker.process_due()
        self.assertEqual(self.broker.info("q")["delayed"], 9)
        counters = self.broker.counters
        self.assertEqual((counters["msg-timeouts"], counters["msg-show"]), (9, 9))

    def test_an_expired_message_holds_no_unique_key(self):
        self.fill("q", 30, linger=10)
        self.broker.post("q", b"old", unique="k", linger=20)
        with self.stopped_ticker():
            self.clock.now += 20
            self.assertFalse(self.broker.post("q", b"new", unique="k").duplicate)

    def test_expired_messages_reach_their_dead_channel(self):
        self.fill("q", 21, linger=10, dead="d")
        self.fill("q", 2, linger=10)
        self.clock.now += 10
        self.broker.process_due()
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 0})
        self.assertEqual(self.broker.channel_stats("d"), {"ready": 21, "hidden": 0})
        counters = self.broker.counters
        self.assertEqual((counters["msg-retention"], counters["msg-dead"]), (23, 21))

    def test_pauses_and_old_keys_end_in_pieces(self):
        for n in range(9):
            self.broker.pause(f"p{n}", 10)
            self.broker.post("q", b"x", dedup=f"{n}", dedup_for=10)
        self.clock.now += 10
        self.broker.process_due()
        self.assertEqual(self.broker._state.channels.pauses, {})
        rows = self.broker._store.read("select count(*) from dedups", "select count(*) from pauses")
        self.assertEqual(rows, [[(0,)], [(0,)]])

    def test_a_restart_learns_what_is_due_in_each_channel(self):
        self.fill("a", 9, delay=10)
        self.fill("b", 9, linger=10)
        self.broker.close()
        self.clock.now += 10
        self.broker = self.open()
        self.assertEqual(len(self.bodies("a")), 9)
        self.assertIsNone(self.broker.get("b"))
        until(lambda: self.broker.channel_stats("b") == {"ready": 0, "hidden": 0})

    def test_timers_keep_one_moment_for_each_channel(self):
        timers = self.broker._state.timers
        for n in range(10_000):
            timers.schedule("q", 1e12 - n)
        self.assertLess(len(timers._heap), 3_000)
        timers.set_next("q", linger.NEVER)
        self.assertNotIn("q", timers.due_channels(2e12))


class StatsTest(BrokerTest):
    def test_all_names_of_linger_1_are_there_and_start_at_zero(self):
        stats = self.broker.stats()
        for name in linger.COUNTERS:
            self.assertEqual(stats.pop(name), 0, name)
        self.assertEqual(
            sorted(stats),
            sorted(
                [
                    "start",
                    "current-topics",
                    "current-subscriptions",
                    "current-channels",
                    "current-messages",
                    "current-messages-ready",
                    "current-messages-hidden",
                    "current-messages-urgent",
                    "current-messages-niced",
                    "current-uptime",
                    "current-waiting",
                    "db-free",
                    "db-file",
                    "db-size",
                    "pid",
                    "rusage-utime",
                    "rusage-stime",
                    "version",
                    "msg-max-id",
                    "msg-max-size",
                    "id",
                    "hostname",
                ]
            ),
        )

    def test_counters_count(self):
        self.broker.subscribe("q", "t")
        self.broker.publish("t", b"x")
        id = self.broker.post("q", b"x", timeout=1, priority=-1).id
        self.broker.post("q", b"x", priority=1)
        self.broker.get("q")
        self.broker.touch(id)
        self.clock.now += 1
        self.broker.get("nothing")
        self.broker.delete(id)
        self.broker.drain("other")
        self.broker.unsubscribe("q", "t")
        expected = {
            "msg-add": 3, "msg-get": 2, "delivered": 1, "msg-hide": 1, "msg-show": 4,
            "msg-timeouts": 1, "msg-retention": 0, "msg-touch": 1, "msg-delete": 1, "publish": 1,
            "publications": 1,
            "msg-release": 0, "msg-reject": 0, "msg-dead": 0, "msg-redrive": 0,
            "channel-create": 0, "channel-remove": 0, "channel-drain": 1, "subscription-add": 1,
            "subscription-delete": 1,
        }  # fmt: skip
        self.assertEqual(self.broker.counters, expected)

    def test_what_there_is_is_counted(self):
        self.broker.subscribe("a", "t")
        self.broker.subscribe("b", "t")
        for priority in (-1, -2, 0, 5):
            self.broker.post("q", b"x", priority=priority)
        self.broker.get("q")
        stats = self.broker.stats()
        names = ("topics", "subscriptions", "channels", "messages", "messages-ready",
                 "messages-hidden", "messages-urgent", "messages-niced")  # fmt: skip
        self.assertEqual([stats[f"current-{n}"] for n in names], [1, 2, 3, 4, 3, 1, 2, 1])
        self.assertEqual(stats["msg-max-id"], 4)

    def test_channels_are_summed_a_page_at_a_time(self):
        for n in range(7):
            self.broker.post(f"q{n}", b"x", delay=n % 2)
        for page in (1, 6, 7, 8):
            with unittest.mock.patch.object(linger, "CHANNEL_PAGE", page):
                stats = self.broker.stats()
            counts = [stats[f"current-messages{s}"] for s in ("", "-ready", "-hidden")]
            self.assertEqual(counts, [7, 4, 3], page)

    def test_kept_counts_agree_with_the_rows(self):
        for n in range(40):
            self.broker.post(f"q{n % 4}", b"x", timeout=1 + n % 3, deliver=n % 3, linger=n % 5)
        for n in range(30):
            self.broker.get(f"q{n % 4}")
            self.clock.now += 0.2
            with contextlib.suppress(linger.LingerError):
                self.broker.delete(n)
        self.broker.process_due()
        counted, kept = self.broker._committer.read(
            "select channel, sum(state = 0), sum(state > 0)"
            " from messages group by channel order by channel",
            "select name, ready, in_flight + delayed from channels order by name",
        )
        self.assertEqual(counted, kept)

    def test_a_channel_is_listed_for_three_minutes_after_its_last_consumer(self):
        future = self.park("q")
        self.assertEqual(self.broker.channels(), ["q"])
        self.broker.post("q", b"x")
        self.broker.delete(future.result(PATIENCE).id)
        self.clock.now += 179
        self.assertEqual(self.broker.channels(), ["q"])
        self.clock.now += 1
        self.assertEqual(self.broker.channels(), [])
        counters = self.broker.counters
        self.assertEqual((counters["channel-create"], counters["channel-remove"]), (1, 1))


class EventTest(BrokerTest):
    """What happens to messages is counted by channel, once it is committed."""

    def counts(self, channel="q"):
        """The counters of a channel that are not 0."""
        counts = self.broker.statistics.events().get(channel, {})
        return {event: count for event, count in counts.items() if count}

    def take(self, channel="q", **options):
        consumer = self.broker.consumer([channel], **options)
        return consumer, self.broker.take(consumer)

    def test_each_event_counts_in_the_channel_of_the_message(self):
        self.broker.subscribe("q", "t")
        self.broker.publish("t", b"x")
        self.broker.post_batch("q", [(b"x", "text/plain", {})] * 4)
        self.broker.post("q", b"x", linger=1)
        self.broker.delete(self.broker.get("q").id)
        self.broker.release(self.broker.get("q").id, delay=60)
        self.broker.reject(self.broker.get("q").id)
        self.broker.get("q", auto=True)
        self.broker.get("q", timeout=1)
        self.clock.now += 1
        self.broker.process_due()
        expected = {
            "posted": 6, "delivered": 5, "deleted": 2, "released": 1, "rejected": 1,
            "timed_out": 1, "expired": 1,
        }  # fmt: skip
        self.assertEqual(self.counts(), expected)
        self.assertEqual(self.broker.counters["publications"], 1)

    def test_dead_letters_count_in_the_channel_that_they_leave(self):
        for options in (
            {"deliver": 1, "timeout": 1},
            {"linger": 1, "delay": 0},
            {},
            {"deliver": 1},
        ):
            self.broker.post("q", b"x", dead="dead", **options)
        for _ in range(2):
            self.broker.get("q", timeout=1)
        self.broker.reject(self.broker.get("q").id)
        self.broker.release(self.broker.get("q").id)
        self.clock.now += 1
        self.broker.process_due()
        expected = {
            "posted": 4, "delivered": 4, "released": 1, "rejected": 1, "timed_out": 2,
            "expired": 1, "dead_lettered": 4,
        }  # fmt: skip
        self.assertEqual(self.counts(), expected)
        self.broker.redrive("dead")
        self.broker.drain("q")
        self.assertEqual(self.counts("dead"), {"redriven": 4})
        self.assertEqual(self.counts(), {**expected, "deleted": 4})

    def test_what_is_refused_or_repeated_is_not_counted(self):
        self.broker.set_settings("q", hlm=2)
        self.broker.subscribe("q", "t")
        for _ in range(2):
            self.broker.post("q", b"x", dedup="key")
            self.broker.post("q", b"x", unique="key")
            self.broker.publish("t", b"x", dedup="key")
        with self.assertRaises(linger.Full):
            self.broker.post("q", b"x")
        with self.assertRaises(linger.Full):
            self.broker.post_batch("q", [(b"x", "text/plain", {})] * 2)
        message = self.broker.get("q")
        for call in (self.broker.delete, self.broker.release, self.broker.reject):
            with self.assertRaises(linger.Conflict):
                call(message.id, message.lease + 1)
        self.assertEqual(self.broker.delete_batch([(message.id, 9), (99, None)]), (
            [], [message.id], [99]))  # fmt: skip
        self.assertEqual(self.counts(), {"posted": 2, "delivered": 1})
        self.assertEqual(self.broker.counters["publications"], 1)

    def test_what_is_rolled_back_is_not_counted(self):
        bad = unittest.mock.patch.object(linger, "ADD_MESSAGE", "insert into nothing values (1)")
        with bad, self.assertRaises(linger.Unavailable):
            self.broker.post("q", b"x")
        self.assertEqual(self.counts(), {})

    def test_an_undone_delivery_does_not_count_and_no_counter_decreases(self):
        self.broker.post("q", b"x")
        for auto in (False, True):
            consumer, messages = self.take(auto=auto)
            self.broker.undo_take(consumer, messages)
        self.broker.get("q", auto=True)
        self.assertEqual(self.counts(), {"posted": 1, "delivered": 1, "deleted": 1})
        self.broker.post("q", b"x")
        consumer, messages = self.take(auto=True)
        shown = self.counts()
        self.broker.undo_take(consumer, messages)
        self.assertEqual(self.counts(), shown)
        self.take(auto=True)
        self.assertEqual(self.counts(), shown)

    def test_a_deletion_counts_where_the_message_was(self):
        """Whether or not this server has delivered it, and where it was moved meanwhile."""
        first, second = (self.broker.post("q", b"x").id for _ in range(2))
        dead = self.broker.post("q", b"x", priority=-1, timeout=1, deliver=1, dead="dead").id
        self.broker.post("other", b"x")
        self.broker.get("q")
        self.clock.now += 1
        self.broker.process_due()
        self.broker.delete(dead)
        taken = self.broker.get("q")
        self.assertEqual(self.broker.delete_batch([(first, taken.lease), (second, None)])[0],
                         [first, second])  # fmt: skip
        self.assertEqual(self.counts("dead"), {"deleted": 1})
        self.assertEqual(self.counts()["deleted"], 2)
        self.broker.post("q", b"x")
        taken = self.broker.get("q")
        self.restart()
        self.broker.take(self.broker.consumer(["other"]), ack=taken.id)
        self.assertEqual(self.counts(), {"deleted": 1})
        self.assertEqual(self.counts("other"), {"delivered": 1})

    def test_a_message_in_flight_needs_no_look_up_to_be_deleted(self):
        self.broker.post("q", b"x")
        operation = linger.Delete(
            self.broker._state, self.broker.get("q").id, None, None, self.clock.now
        )
        self.assertEqual(operation.statements, (linger.DELETE_MESSAGE,))

    def test_further_channels_are_counted_together(self):
        self.restart(metrics_channels=2)
        for channel in ("a", "b", "c", "d", "a"):
            self.broker.post(channel, b"x")
        self.assertEqual([self.counts(channel)["posted"] for channel in ("a", "b", "")], [2, 1, 2])
        self.assertEqual(set(self.broker.statistics.events()), {"", "a", "b"})

    def test_only_the_latest_flights_are_kept(self):
        with unittest.mock.patch.object(linger, "MAX_FLIGHTS", 8):
            flights = linger.Flights()
            for id in range(100):
                flights.latest()[id] = linger.Flight("q", 0.0, 1.0, 1, "who")
        known = [id for id in range(100) if flights.find(id, 0.5)]
        self.assertEqual(known, list(range(92, 100)))
        self.assertIsNone(flights.find(99, 1.0))
        self.assertEqual([flights.pop(99) is None for _ in range(2)], [False, True])


class HistoryTest(BrokerTest):
    def sample(self, seconds=5):
        self.clock.now += seconds
        self.broker.statistics.sample()

    def test_a_point_has_what_happened_since_the_one_before(self):
        self.broker.subscribe("q", "t")
        for _ in range(3):
            self.broker.post("q", b"x")
        self.sample()
        self.broker.publish("t", b"x")
        self.broker.delete(self.broker.get("q").id)
        self.broker.release(self.broker.get("q").id)
        self.broker.get("q")
        self.sample()
        expected = {
            "interval": 5, "time": [self.clock.now - 5, self.clock.now], "posted": (3, 1),
            "delivered": (0, 3), "deleted": (0, 1), "failed": (0, 1), "published": (0, 1),
            "ready": (3, 2), "in-flight": (0, 1),
        }  # fmt: skip
        self.assertEqual(self.broker.statistics.history(), expected)

    def test_it_has_a_point_each_five_seconds_for_an_hour(self):
        for _ in range(4_000):
            self.sample(1)
        self.assertEqual(len(self.broker.statistics.history()["time"]), 720)
        self.assertEqual(len(self.broker.statistics.history(60)["time"]), 12)

    def test_times_are_of_the_wall_clock_and_evenly_spaced_though_it_steps(self):
        self.sample()
        self.clock.ahead = -1_000
        self.sample()
        now = self.clock.time()
        self.assertEqual(self.broker.statistics.history()["time"], [now - 5, now])

    def test_there_is_one_point_for_the_time_of_a_suspend(self):
        self.broker.post("q", b"x")
        self.sample(1_003)
        self.sample(1)
        self.sample(1)
        now = self.clock.now
        self.assertEqual(self.broker.statistics.history()["time"], [now - 2, now])
        self.assertEqual(self.broker.statistics.history()["posted"], (1, 0))

    def test_nothing_has_happened_yet(self):
        self.assertEqual(self.broker.statistics.history()["time"], [])
        self.assertEqual(self.broker.statistics.history()["posted"], ())


class RepeatedTryTest(BrokerTest):
    """A shared transaction fails, and each operation runs again in one of its own; with a file."""

    def fill_disk(self):
        """Lets each transaction with a post fail when all its statements have run."""
        self.broker._store._space.before_commit = refuse_posts

    def test_an_undo_puts_back_what_was_taken_after_a_try_that_was_undone(self):
        self.broker.post("q", b"x")
        self.fill_disk()
        done, consumer = queue.SimpleQueue(), self.broker.consumer(["q"], auto=True)
        with busy(self.broker._committer):
            self.broker.post_async(done.put, "q", b"first", priority=-1)
            self.broker.take_async(done.put, consumer, 0)
        post, take = (done.get(timeout=PATIENCE) for _ in range(2))
        self.assertRaises(linger.Full, post.result)
        self.broker.undo_take(consumer, take.result())
        self.assertEqual(self.bodies("q"), [b"x"])

    def test_a_group_goes_on_after_a_try_that_was_undone(self):
        for body in (b"1", b"2"):
            self.broker.post("q", body, group="g")
        self.fill_disk()
        done, consumer = queue.SimpleQueue(), self.broker.consumer(["q"], auto=True)
        with busy(self.broker._committer):
            self.broker.post_async(done.put, "q", b"first", priority=-1)
            self.broker.take_async(done.put, consumer, 0)
        taken = [done.get(timeout=PATIENCE) for _ in range(2)][1].result()
        self.assertEqual(taken[0].body, b"1")
        self.assertEqual(self.broker.get("q").body, b"2")

    def test_what_is_declined_goes_back_after_a_try_that_was_undone(self):
        memory = unittest.mock.Mock()
        memory.room.return_value = 10**6
        memory.resize.side_effect = linger.Unavailable("no memory")
        for auto, bodies in itertools.product((False, True), ([b"x"], [])):
            with self.subTest(auto=auto, bodies=bodies):
                self.restart()
                for body in bodies:
                    self.broker.post("q", body, group="g")
                self.fill_disk()
                done, consumer = queue.SimpleQueue(), self.broker.consumer(["q"], auto=auto)
                consumer.memory = memory
                with busy(self.broker._committer):
                    self.broker.post_async(done.put, "q", b"first", priority=-1)
                    self.broker.take_async(done.put, consumer, 0)
                post, take = (done.get(timeout=PATIENCE) for _ in range(2))
                self.assertRaises(linger.Full, post.result)
                if bodies:
                    self.assertRaises(linger.Unavailable, take.result)
                else:
                    self.assertEqual(take.result(), [])
                self.assertEqual(self.broker.info("q")["in-flight"], 0)
                taken = self.broker.take(self.broker.consumer(["q"], 9, auto=True))
                self.assertEqual([message.body for message in taken], bodies)

    def test_what_is_declined_is_not_lost_if_it_cannot_be_put_back(self):
        self.broker.post("q", b"x")
        consumer = self.broker.consumer(["q"], auto=True)
        consumer.memory = unittest.mock.Mock()
        consumer.memory.resize.side_effect = linger.Unavailable("no memory")
        with unittest.mock.patch.object(linger, "RESTORE_MESSAGE", "nonsense"):
            self.assertRaises(linger.Unavailable, self.broker.take, consumer)
        self.assertEqual(self.broker._state.events["q"]["delivered"], 0)
        self.assertEqual(self.bodies("q"), [b"x"])

    def test_a_delete_says_nothing_wrong_after_a_try_that_was_undone(self):
        self.broker.post("q", b"x", timeout=1)
        message, done = self.broker.get("q"), queue.SimpleQueue()
        self.clock.now += 1
        self.broker.process_due()
        self.fill_disk()
        with busy(self.broker._committer):
            self.broker.post_async(done.put, "q", b"first", priority=-1)
            self.broker.take_async(done.put, self.broker.consumer(["q"]), 0)
            self.broker.delete_async(done.put, message.id, message.lease)
        post, take, delete = (done.get(timeout=PATIENCE) for _ in range(3))
        self.assertRaises(linger.Full, post.result)
        self.assertEqual(take.result()[0].lease, message.lease + 1)
        with self.assertRaisesRegex(linger.Conflict, "overtaken"):
            delete.result()

    def test_a_consumer_keeps_no_memory_of_a_try_that_failed(self):
        budget, done = linger.MemoryBudget(10**9), queue.SimpleQueue()
        woken, other = (
            self.broker.consumer(["q"], memory=linger.Reservation(budget)) for _ in range(2)
        )
        self.broker.take_async(bool, woken, PATIENCE)
        until(lambda: woken.waiting)
        self.fill_disk()
        with busy(self.broker._committer):
            for _ in range(2):
                self.broker.post_async(done.put, "q", b"x" * 100_000)
            self.broker.take_async(bool, other, PATIENCE)
        for _ in range(2):
            self.assertRaises(linger.Full, done.get(timeout=PATIENCE).result)
        until(lambda: woken.waiting and other.waiting)
        self.assertEqual(budget.used, 0)


class LeaseAndReleaseTest(BrokerTest):
    def take(self, channel="q", **options):
        return self.broker.take(self.broker.consumer([channel], **options))

    def test_touch_with_a_timeout_is_for_this_delivery_only(self):
        id = self.broker.post("q", b"x", timeout=10).id
        self.broker.get("q")
        self.broker.touch(id, timeout=100)
        self.clock.now += 99
        self.assertIsNone(self.broker.get("q"))
        self.clock.now += 1
        self.assertEqual(self.broker.get("q").timeout, 10)
        self.clock.now += 10
        self.assertEqual(self.broker.get("q").delivered, 3)

    def test_a_dead_letter_that_was_touched_is_deleted_from_its_dead_channel(self):
        id = self.broker.post("q", b"x", timeout=1, deliver=1, dead="d").id
        self.broker.get("q", timeout=100)
        self.broker.touch(id)  # now it ends after a second
        self.clock.now += 1
        self.broker.process_due()
        self.broker.delete(id)
        events = self.broker._state.events
        self.assertEqual((events["q"]["deleted"], events["d"]["deleted"]), (0, 1))

    def test_touch_keeps_the_lease(self):
        id = self.broker.post("q", b"x").id
        lease = self.broker.get("q").lease
        self.broker.touch(id, lease)
        self.broker.delete(id, lease)

    def test_a_released_message_goes_back_to_its_old_place(self):
        for body in (b"1", b"2", b"3"):
            self.broker.post("q", body)
        first = self.broker.get("q")
        self.broker.get("q")
        self.broker.release(first.id, first.lease)
        message = self.broker.get("q")
        self.assertEqual((message.body, message.delivered), (b"1", 2))
        self.assertEqual(self.broker.get("q").body, b"3")

    def test_a_release_with_a_delay_hides_the_message_that_long(self):
        id = self.broker.post("q", b"x").id
        self.broker.get("q")
        self.broker.release(id, delay=50)
        self.assertEqual(self.broker.read_message(id)[1], "delayed")
        self.clock.now += 49
        self.assertIsNone(self.broker.get("q"))
        self.clock.now += 1
        self.assertEqual(self.broker.get("q").delivered, 2)

    def test_a_release_wakes_a_consumer(self):
        id = self.broker.post("q", b"x").id
        self.broker.get("q")
        future = self.park("q")
        self.broker.release(id, reason="busy")
        self.assertEqual((future.result(PATIENCE).id, future.result().error), (id, "busy"))

    def test_uncounted_release_undoes_the_delivery(self):
        self.broker.post("q", b"x", deliver=1, dead="failed", backoff="100")
        for _ in range(3):
            message = self.broker.get("q")
            self.assertEqual(message.delivered, 1)
            self.broker.release(1, message.lease, reason="no memory", uncounted=True)
            released, state = self.broker.read_message(1)
            self.assertEqual((released.delivered, state), (0, "ready"))
        self.assertEqual((released.error, released.lease), ("no memory", 3))

    def test_uncounted_release_may_have_a_delay_and_leaves_the_reason(self):
        self.broker.post("q", b"x")
        self.broker.release(1, self.broker.get("q").lease, reason="first")
        self.broker.release(1, self.broker.get("q").lease, delay=50, uncounted=True)
        self.assertIsNone(self.broker.get("q"))
        self.clock.now += 50
        message = self.broker.get("q")
        self.assertEqual((message.delivered, message.error), (2, "first"))

    def test_uncounted_release_wakes_a_consumer(self):
        self.broker.post("q", b"x")
        message = self.broker.get("q")
        future = self.park("q")
        self.broker.release(1, message.lease, uncounted=True)
        self.assertEqual(future.result(PATIENCE).delivered, 1)

    def test_uncounted_release_needs_the_lease_of_the_latest_delivery(self):
        self.broker.post("q", b"x")
        lease = self.broker.get("q").lease
        with self.assertRaisesRegex(linger.BadRequest, "needs the lease"):
            self.broker.release(1, uncounted=True)
        with self.assertRaises(linger.Conflict):
            self.broker.release(1, lease + 1, uncounted=True)
        self.assertEqual(self.broker.read_message(1)[0].delivered, 1)
        self.broker.release(1, lease, uncounted=True)
        with self.assertRaises(linger.Conflict):
            self.broker.release(1, lease, uncounted=True)
        self.assertEqual(self.broker.read_message(1)[0].delivered, 0)

    def test_only_what_is_in_flight_can_be_released(self):
        id = self.broker.post("q", b"x").id
        with self.assertRaises(linger.Conflict):
            self.broker.release(id)
        self.broker.get("q")
        self.broker.release(id)
        with self.assertRaises(linger.Conflict):
            self.broker.release(id)
        with self.assertRaises(linger.NotFound):
            self.broker.release(99)

    def test_a_late_release_before_the_next_delivery_still_counts(self):
        id = self.broker.post("q", b"x", timeout=10).id
        lease = self.broker.get("q").lease
        self.clock.now += 11
        self.broker.release(id, lease, delay=10)
        self.assertIsNone(self.broker.get("q"))

    def test_a_lost_lease_releases_and_rejects_nothing(self):
        id = self.broker.post("q", b"x", timeout=1).id
        lease = self.broker.get("q").lease
        self.clock.now += 1
        self.broker.get("q")
        for call in (self.broker.release, self.broker.reject):
            with self.assertRaisesRegex(linger.Conflict, "overtaken"):
                call(id, lease)
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 1})

    def test_a_release_of_the_last_delivery_uses_the_deliveries_up(self):
        id = self.broker.post("q", b"x", deliver=1, dead="d").id
        self.broker.get("q")
        self.broker.release(id, reason="no")
        message = self.broker.get("d")
        self.assertEqual((message.dead_reason, message.error), ("deliver", "no"))
        counters = self.broker.counters
        self.assertEqual((counters["msg-release"], counters["msg-reject"]), (1, 0))

    def test_a_rejected_message_without_a_dead_channel_is_gone(self):
        id = self.broker.post("q", b"x").id
        self.broker.get("q")
        self.broker.reject(id)
        with self.assertRaises(linger.NotFound):
            self.broker.read_message(id)
        self.assertEqual(self.broker.channels(), [])

    def test_the_last_reason_is_kept_until_another_is_given(self):
        id = self.broker.post("q", b"x").id
        for reason, expected in (("a", "a"), ("", "a"), ("ü\n", "ü\n")):
            self.broker.get("q")
            self.broker.release(id, reason=reason)
            self.assertEqual(self.broker.read_message(id)[0].error, expected)
        self.broker.get("q")
        with self.assertRaises(linger.TooLarge):
            self.broker.release(id, reason="x" * 4097)

    def test_a_delayed_message_is_ready_when_its_time_comes(self):
        self.broker.post("q", b"later", delay=10)
        self.broker.post("q", b"now")
        self.assertEqual(self.bodies("q"), [b"now"])
        self.assertEqual(self.broker.info("q")["delayed"], 1)
        self.clock.now += 10
        self.assertEqual(self.bodies("q"), [b"later"])

    def test_a_delayed_message_survives_a_restart_and_wakes_a_consumer_on_time(self):
        self.broker.post("q", b"x", delay=10)
        self.restart()
        future = self.park("q")
        self.clock.now += 9
        self.broker.process_due()
        self.assertFalse(future.done())
        self.clock.now += 1
        self.broker.process_due()
        self.assertEqual(future.result(PATIENCE).body, b"x")

    def test_linger_must_be_longer_than_delay(self):
        with self.assertRaisesRegex(linger.BadRequest, "longer than delay"):
            self.broker.post("q", b"x", delay=10, linger=10)
        self.broker.post("q", b"x", delay=10, linger=11)
        self.clock.now += 11
        self.assertIsNone(self.broker.get("q"))

    def test_a_backoff_hides_for_longer_after_each_failure_and_the_last_step_repeats(self):
        id = self.broker.post("q", b"x", timeout=5, backoff="10,60").id
        for step in (10, 60, 60):
            self.broker.get("q")
            self.broker.release(id)
            self.clock.now += step - 1
            self.assertIsNone(self.broker.get("q"))
            self.clock.now += 1
        self.broker.get("q")
        self.clock.now += 5  # its timeout passes
        self.assertEqual(self.broker.read_message(id)[1], "delayed")
        self.clock.now += 59
        self.assertIsNone(self.broker.get("q"))
        self.clock.now += 1
        self.assertIsNotNone(self.broker.get("q"))
        self.broker.release(id, delay=0)
        self.assertIsNotNone(self.broker.get("q"))

    def test_a_delivery_shows_the_backoff_as_it_was_given(self):
        self.broker.post("q", b"x", backoff="10,60")
        self.broker.post("q", b"y")
        self.assertEqual([self.broker.get("q").backoff for _ in "xy"], ["10,60", ""])

    def test_a_backoff_holds_over_a_restart(self):
        self.broker.post("q", b"x", timeout=5, backoff="100")
        self.broker.get("q")
        self.restart()
        self.clock.now += 5
        self.assertIsNone(self.broker.get("q"))
        self.clock.now += 99
        self.assertIsNone(self.broker.get("q"))
        self.clock.now += 1
        self.assertIsNotNone(self.broker.get("q"))

    def test_bad_backoffs_are_refused(self):
        for backoff in ("x", "1,,2", "-1", "1.5", "9" * 10, ",".join("1" * 33)):
            with self.subTest(backoff), self.assertRaisesRegex(linger.BadRequest, "backoff"):
                self.broker.post("q", b"x", backoff=backoff)

    def test_a_message_released_after_it_expired_is_removed_at_once(self):
        for delay in (0, 100):
            id = self.broker.post("q", b"x", linger=2, timeout=60, dead="d").id
            self.broker.get("q")
            self.clock.now += 3
            future, dead = self.park("q"), self.park("d")
            self.broker.release(id, delay=delay)
            self.assertEqual(dead.result(PATIENCE).dead_reason, "linger")
            self.broker.post("q", b"next")
            self.assertEqual(future.result(PATIENCE).body, b"next")

    def test_a_delivery_undone_after_its_message_expired_removes_it_at_once(self):
        for auto in (False, True):
            self.broker.post("q", b"x", linger=2)
            consumer = self.broker.consumer(["q"], auto=auto)
            taken = self.broker.take(consumer)
            self.clock.now += 3
            future = self.park("q")
            self.broker.undo_take(consumer, taken)
            self.broker.post("q", b"next")
            self.assertEqual(future.result(PATIENCE).body, b"next")

    def test_lingering_is_awaited_while_a_released_message_is_delayed(self):
        id = self.broker.post("q", b"x", linger=10, timeout=60, dead="d").id
        self.broker.get("q")
        self.clock.now += 5
        self.broker.process_due()
        self.broker.release(id, delay=100)
        self.clock.now += 5
        self.assertIsNotNone(self.broker.get("d"))


class DeadLetterTest(BrokerTest):
    def test_when_the_last_delivery_times_out_the_message_moves_at_that_moment(self):
        id = self.broker.post("q", b"x", "a/b", timeout=10, deliver=2, dead="d", priority=4).id
        self.broker.get("q")
        self.clock.now += 10
        self.broker.get("q")
        future = self.park("d")
        self.clock.now += 9.9
        self.broker.process_due()
        self.assertFalse(future.done())
        self.clock.now += 0.1
        self.assertIsNone(self.broker.get("q"))
        message = future.result(PATIENCE)
        self.assertEqual((message.id, message.body, message.type), (id, b"x", "a/b"))
        self.assertEqual((message.priority, message.delivered, message.linger), (4, 1, 0))
        self.assertEqual((message.dead_from, message.dead_reason), ("q", "deliver"))
        self.assertEqual(self.broker.counters["msg-dead"], 1)

    def test_a_message_whose_lingering_is_over_moves(self):
        self.broker.post("q", b"ready", linger=5, dead="d")
        self.broker.post("q", b"delayed", linger=5, delay=4, dead="d")
        self.broker.post("q", b"taken", linger=5, timeout=9, dead="d", priority=-1)
        self.broker.get("q")
        self.clock.now += 5
        self.assertIsNone(self.broker.get("q"))
        self.assertEqual(self.bodies("d"), [b"ready", b"delayed"])
        self.clock.now += 4
        message = self.broker.get("d")
        self.assertEqual((message.body, message.dead_reason), (b"taken", "linger"))
        self.clock.now += 1000
        self.assertEqual(len(self.bodies("d")), 3)  # their lingering is off

    def test_a_rejected_message_moves_with_its_reason(self):
        id = self.broker.post("q", b"x", dead="d").id
        self.broker.get("q")
        self.broker.reject(id, reason="broken")
        message = self.broker.get("d")
        self.assertEqual((message.dead_reason, message.error), ("reject", "broken"))

    def test_a_dead_letter_says_how_often_it_was_delivered_before(self):
        id = self.broker.post("q", b"x", dead="d").id
        for _ in range(3):
            self.broker.get("q")
            self.broker.release(id)
        self.broker.reject(id)
        taken = self.broker.take(consumer := self.broker.consumer(["d"], auto=True))
        self.assertEqual((taken[0].delivered, taken[0].dead_delivered), (1, 3))
        self.broker.undo_take(consumer, taken)
        self.assertEqual(self.broker.get("d").dead_delivered, 3)
        self.broker.release(id)
        self.broker.redrive("d")
        self.assertEqual(self.broker.read_message(id)[0].dead_delivered, 0)

    def test_the_move_ignores_the_mark_of_its_target(self):
        self.restart(hlm=1)
        self.broker.post("d", b"full")
        id = self.broker.post("q", b"x", dead="d").id
        self.broker.reject(id)
        self.assertEqual(self.broker.channel_stats("d")["ready"], 2)

    def test_a_loop_of_dead_channels_ends(self):
        self.broker.set_settings("a", dead="b", deliver=1, timeout=1)
        self.broker.set_settings("b", dead="a", deliver=1, timeout=1)
        self.broker.post("a", b"x")
        for channel in ("a", "b"):
            self.assertIsNotNone(self.broker.get(channel))
            self.clock.now += 1
        self.assertEqual(self.broker.stats()["current-messages"], 0)

    def test_a_message_is_never_dead_lettered_into_its_own_channel(self):
        id = self.broker.post("q", b"x", dead="q").id
        self.broker.reject(id)
        self.assertEqual(self.broker.channels(), [])

    def test_a_redrive_moves_back_in_order_with_deliveries_at_zero(self):
        for n in range(4):
            id = self.broker.post("pq"[n % 2], b"%d" % n, dead="d", deliver=1).id
            self.broker.get("pq"[n % 2])
            self.broker.reject(id, reason="why")
        self.broker.post("d", b"no letter")
        future = self.park("p")
        self.assertEqual(self.broker.redrive("d", n=1), 1)
        message = future.result(PATIENCE)
        self.assertEqual((message.body, message.delivered, message.error), (b"0", 1, "why"))
        self.assertEqual((message.dead_from, message.dead_reason), ("", ""))
        self.assertEqual(self.broker.redrive("d"), 3)
        self.assertEqual(self.bodies("q"), [b"1", b"3"])
        self.assertEqual(self.bodies("p"), [b"2"])
        self.assertEqual(self.bodies("d"), [b"no letter"])
        self.clock.now += 30  # deliver=1 is used up: they are dead letters again
        self.assertEqual(self.broker.channel_stats("d")["ready"], 5)

    def test_an_old_lease_does_not_hold_what_was_redriven(self):
        id = self.broker.post("d", b"1", timeout=1).id
        lease = self.broker.get("d").lease
        self.clock.now += 1
        self.broker.redrive("d", to="q")
        with self.assertRaises(linger.Conflict):
            self.broker.touch(id, lease)

    def test_a_redrive_can_go_elsewhere(self):
        self.broker.post("d", b"1")
        self.assertEqual(self.broker.redrive("d"), 0)
        self.assertEqual(self.broker.redrive("d", to="x"), 1)
        self.assertEqual(self.bodies("x"), [b"1"])
        with self.assertRaises(linger.BadRequest):
            self.broker.redrive("d", to="d")

    def test_a_rejection_that_is_sent_again_leaves_the_dead_letter(self):
        id = self.broker.post("q", b"x", dead="d").id
        self.broker.get("q")
        self.broker.reject(id, lease=1)
        with self.assertRaisesRegex(linger.Conflict, "not in flight"):
            self.broker.reject(id, lease=1)
        self.assertEqual(self.broker.read_message(id)[0].channel, "d")


class KeyTest(BrokerTest):
    def test_a_second_post_with_a_dedup_key_adds_nothing(self):
        first = self.broker.post("q", b"1", dedup="k")
        self.assertEqual(self.broker.post("q", b"2", dedup="k"), (first.id, True))
        self.assertFalse(self.broker.post("q", b"3", dedup="other").duplicate)
        self.assertFalse(self.broker.post("p", b"4", dedup="k").duplicate)
        self.assertEqual(self.bodies("q"), [b"1", b"3"])

    def test_a_dedup_key_outlives_its_message_and_a_restart_but_not_its_time(self):
        id = self.broker.post("q", b"1", dedup="k", dedup_for=60).id
        self.broker.delete(id)
        self.restart()
        self.clock.now += 59
        self.assertEqual(self.broker.post("q", b"2", dedup="k"), (id, True))
        self.clock.now += 1
        self.assertFalse(self.broker.post("q", b"2", dedup="k").duplicate)

    def test_dedup_keys_last_300_seconds_and_are_forgotten(self):
        self.broker.post("q", b"1", dedup="k")
        self.clock.now += 299
        self.assertTrue(self.broker.post("q", b"2", dedup="k").duplicate)
        self.clock.now += 1
        self.broker.process_due()
        self.assertEqual(self.broker._committer.read("select count(*) from dedups"), [[(0,)]])

    def test_a_drain_clears_the_keys_of_the_channel(self):
        self.broker.post("q", b"1", dedup="k")
        self.broker.post("p", b"1", dedup="k")
        self.broker.drain("q")
        self.assertFalse(self.broker.post("q", b"2", dedup="k").duplicate)
        self.assertTrue(self.broker.post("p", b"2", dedup="k").duplicate)

    def test_a_refused_post_leaves_no_key(self):
        self.restart(hlm=1)
        self.broker.post("q", b"full")
        with self.assertRaises(linger.Full):
            self.broker.post("q", b"1", dedup="k")
        self.broker.delete(1)
        self.assertFalse(self.broker.post("q", b"1", dedup="k").duplicate)

    def test_a_dedup_key_of_a_topic_repeats_the_answer(self):
        for channel in ("a", "b c"):
            self.broker.subscribe(channel, "t")
        first, _, duplicate = self.broker.publish("t", b"1", dedup="k")
        self.assertFalse(duplicate)
        self.assertEqual(self.broker.publish("t", b"2", dedup="k"), (first, [], True))
        self.assertEqual(self.bodies("b c"), [b"1"])
        self.assertEqual(self.broker.publish("nobody", b"1", dedup="k"), ({}, [], False))
        self.assertEqual(self.broker.publish("nobody", b"1", dedup="k"), ({}, [], True))

    def test_a_name_with_a_line_separator_does_not_break_the_answer(self):
        self.broker.subscribe("a\u2028b", "t")
        first = self.broker.publish("t", b"1", dedup="k")[0]
        self.assertEqual(self.broker.publish("t", b"1", dedup="k")[0], first)

    def test_a_unique_hit_is_remembered_under_the_dedup_key(self):
        first = self.broker.post("q", b"1", unique="u")
        for _ in range(2):
            again = self.broker.post("q", b"1", unique="u", dedup="k", dedup_for=60)
            self.assertEqual(again, (first.id, True))
            self.clock.now += 20
        self.broker.delete(first.id)
        self.assertEqual(self.broker.post("q", b"1", unique="u", dedup="k"), (first.id, True))
        self.clock.now += 20
        self.assertFalse(self.broker.post("q", b"1", unique="u", dedup="k").duplicate)

    def test_a_publication_has_no_unique_key(self):
        with self.assertRaisesRegex(linger.BadRequest, "unique"):
            self.broker.publish("t", b"1", unique="k")

    def test_a_unique_key_is_taken_while_its_message_exists(self):
        first = self.broker.post("q", b"1", unique="k")
        self.assertEqual(self.broker.post("q", b"2", unique="k"), (first.id, True))
        self.broker.get("q")
        self.assertEqual(self.broker.post("q", b"2", unique="k"), (first.id, True))
        self.assertFalse(self.broker.post("p", b"2", unique="k").duplicate)

    def test_a_unique_key_is_freed_by_every_end_of_its_message(self):
        def lingered(id):
            self.clock.now += 9

        for end in (
            self.broker.delete,
            self.broker.reject,
            lingered,
            lambda id: self.broker.drain("q"),
        ):
            posted = self.broker.post("q", b"1", unique="k", linger=9)
            self.assertFalse(posted.duplicate)
            end(posted.id)
        self.assertFalse(self.broker.post("q", b"1", unique="k").duplicate)

    def test_a_unique_key_moves_with_its_message(self):
        id = self.broker.post("q", b"1", unique="k", dead="d").id
        self.broker.reject(id)
        self.assertEqual(self.broker.post("d", b"2", unique="k"), (id, True))
        self.broker.redrive("d")
        self.assertEqual(self.broker.post("q", b"2", unique="k"), (id, True))
        self.assertFalse(self.broker.post("d", b"2", unique="k").duplicate)

    def test_of_messages_with_a_key_that_move_one_keeps_it(self):
        ids = [self.broker.post(c, b"%d" % n, unique="k", dead="d", linger=9).id
               for n, c in enumerate("abc")]  # fmt: skip
        self.clock.now += 9
        self.broker.process_due()
        self.assertEqual(self.unique_keys(ids), ["k", "", ""])
        self.assertEqual(self.broker.post("d", b"4", unique="k"), (ids[0], True))
        self.broker.delete(ids[0])
        self.assertFalse(self.broker.post("d", b"4", unique="k").duplicate)
        self.assertEqual(self.bodies("d"), [b"1", b"2", b"4"])

    def test_of_messages_with_a_key_that_are_redriven_one_keeps_it(self):
        ids = [self.broker.post(c, b"x", unique="k").id for c in ("a", "b", "q")]
        self.broker.redrive("a", to="q")
        self.broker.redrive("b", to="q")
        self.assertEqual(self.unique_keys(ids), ["", "", "k"])
        self.assertEqual(len(self.bodies("q")), 3)

    def unique_keys(self, ids):
        return [self.broker.read_message(id)[0].unique for id in ids]

    def batch(self, key, *bodies):
        return [(b, "x/y", {"dedup": linger.BatchKey(key, n)}) for n, b in enumerate(bodies)]

    def test_a_key_of_a_batch_holds_for_the_batch_and_for_nothing_else(self):
        for key in ("x", "x" * linger.MAX_NAME):
            ids = self.broker.post_batch("q", self.batch(key, b"1", b"2"))
            self.assertEqual(self.broker.post_batch("q", self.batch(key, b"1", b"2")), ids)
        for single in ("x", "x#0", "x#1", "0 x", "1 x"):
            self.assertFalse(self.broker.post("q", b"3", dedup=single).duplicate, single)
        self.broker.drain("q")
        self.assertNotEqual(self.broker.post_batch("q", self.batch("x", b"1", b"2")), ids)

    def test_a_key_of_a_batch_of_publications_holds_for_the_batch_and_for_nothing_else(self):
        self.broker.subscribe("q", "t")
        ids = self.broker.publish_batch("t", self.batch("x", b"1", b"2"))
        self.assertEqual(self.broker.publish_batch("t", self.batch("x", b"1", b"2")), ids)
        self.assertFalse(self.broker.publish("t", b"3", dedup="x#1")[2])

    def test_bad_keys_are_refused(self):
        for key in ("", "x" * 256, "ü" * 128, "\ud800", 5):
            for name in ("dedup", "unique"):
                with self.subTest(key), self.assertRaisesRegex(linger.BadRequest, name):
                    self.broker.post("q", b"x", **{name: key})
        for call in (self.broker.set_settings, lambda c, **p: self.broker.subscribe(c, "t", **p)):
            with self.assertRaisesRegex(linger.BadRequest, "only with a message"):
                call("q", dedup="k")


class TakingTest(BrokerTest):
    def take(self, *channels, wait=0, ack=None, lease=None, **options):
        consumer = self.broker.consumer(channels or ["q"], **options)
        return self.broker.take(consumer, wait, ack, lease)

    def test_a_timeout_given_with_a_take_is_for_that_delivery(self):
        self.broker.post("q", b"x", timeout=10)
        self.assertEqual(self.take(timeout=100)[0].timeout, 100)
        self.clock.now += 99
        self.assertEqual(self.take(), [])
        self.clock.now += 1
        self.assertEqual(self.take()[0].timeout, 10)

    def test_several_are_taken_in_order_as_many_as_there_are(self):
        for n in range(5):
            self.broker.post("q", b"%d" % n, priority=-(n == 3))
        self.assertEqual([m.body for m in self.take(n=3)], [b"3", b"0", b"1"])
        self.assertEqual([m.body for m in self.take(n=100)], [b"2", b"4"])
        self.assertEqual(self.take(n=100), [])
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 5})

    def test_each_of_several_comes_back_after_its_own_timeout(self):
        for timeout in (60, 5, 30):
            self.broker.post("q", b"x", timeout=timeout)
        with self.stopped_ticker():
            self.take(n=3)
            self.clock.now += 5
            self.assertEqual([m.timeout for m in self.take()], [5])

    def test_several_are_bounded_in_bytes_but_one_always_comes(self):
        for size in (3, 3, 3, 20, 1):
            self.broker.post("q", b"x" * size)
        with unittest.mock.patch.object(linger, "MAX_BATCH_BYTES", 8):
            taken = [[len(m.body) for m in self.take(n=9)] for _ in range(3)]
        self.assertEqual(taken, [[3, 3, 3], [20], [1]])

    def test_acknowledge_and_next_is_one_step(self):
        for n in range(3):
            self.broker.post("q", b"%d" % n)
        (message,) = self.take()
        (message,) = self.take(ack=message.id, lease=message.lease)
        self.assertEqual(message.body, b"1")
        self.assertEqual([m.body for m in self.take(ack=message.id, n=9)], [b"2"])
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 1})
        self.assertEqual(self.broker.counters["msg-delete"], 2)

    def test_a_lost_lease_acknowledges_and_takes_nothing(self):
        id = self.broker.post("q", b"1", timeout=1).id
        self.take()
        self.clock.now += 1
        self.take()
        self.broker.post("q", b"2")
        for options in ({}, {"auto": True}, {"n": 5}):
            with self.assertRaises(linger.Conflict):
                self.take(ack=id, lease=1, wait=PATIENCE, **options)
            with self.assertRaises(linger.NotFound):
                self.take("p", "q", ack=99, **options)
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 1})

    def test_an_acknowledgement_is_done_at_once_also_if_the_take_then_waits(self):
        id = self.broker.post("q", b"1").id
        self.take()
        future = self.thread(lambda: self.take(ack=id, wait=PATIENCE))
        until(lambda: count_waiting(self.broker, "q"))
        with self.assertRaises(linger.NotFound):
            self.broker.read_message(id)
        self.broker.post("q", b"2")
        self.assertEqual(future.result(PATIENCE)[0].body, b"2")

    def test_no_failure_of_the_wait_after_it_makes_an_acknowledgement_an_error(self):
        memory = unittest.mock.Mock(
            resize=unittest.mock.Mock(side_effect=linger.Unavailable("full"))
        )
        store = self.broker._store
        transact = store.transact

        def fail(batch):
            if any(isinstance(operation, linger.Take) for operation in batch):
                raise linger.TransactionFailed(linger.Full("full"))
            return transact(batch)

        for failing in ({"memory": memory}, {}):
            self.broker.post("p", b"1")
            (message,) = self.take("p")
            options = {"wait": PATIENCE, "ack": message.id, **failing}
            future = self.thread(functools.partial(self.take, **options))
            until(lambda: count_waiting(self.broker, "q"))
            self.broker.pause("q")
            self.broker.post("q", b"2")
            with contextlib.ExitStack() as stack:
                if not failing:
                    stack.enter_context(unittest.mock.patch.object(store, "transact", fail))
                self.broker.resume("q")
                self.assertEqual(future.result(PATIENCE), [])
            self.broker.delete(self.take()[0].id)

    def test_auto_deletes_on_delivery(self):
        for n in range(3):
            self.broker.post("q", b"%d" % n)
        self.assertEqual([m.body for m in self.take(auto=True)], [b"0"])
        self.assertEqual([m.body for m in self.take(auto=True, n=5)], [b"1", b"2"])
        self.assertEqual(self.broker.channels(), [])

    def test_auto_can_be_undone(self):
        self.broker.post("q", b"1", "a/b", priority=3, deliver=2, dead="d", unique="k")
        self.broker.post("q", b"2", priority=3)
        consumer = self.broker.consumer(["q"], auto=True, n=2)
        before = [self.broker.read_message(id) for id in (1, 2)]
        taken = self.broker.take(consumer)
        self.broker.undo_take(consumer, taken)
        after = [self.broker.read_message(id) for id in (1, 2)]
        self.assertEqual([(m._replace(lease=0), s) for m, s in after], before)
        self.assertEqual(self.broker.get("q").lease, 2)
        self.assertTrue(self.broker.post("q", b"3", unique="k").duplicate)

    def test_of_several_channels_the_first_that_has_a_message_gives(self):
        self.broker.post("c", b"c")
        self.broker.post("b", b"b")
        names = ("a", "b", "c")
        taken = [self.take(*names)[0].channel, self.take(*names, n=5)[0].channel]
        self.assertEqual(taken, ["b", "c"])
        self.assertEqual(self.take(*names), [])

    def test_one_waits_at_several_channels_and_is_woken_by_the_first(self):
        future = self.thread(lambda: self.take("a", "b", wait=PATIENCE))
        until(lambda: count_waiting(self.broker, "b"))
        self.broker.post("b", b"x")
        self.assertEqual(future.result(PATIENCE)[0].channel, "b")
        self.assertEqual(count_waiting(self.broker, "a"), 0)

    def test_no_message_is_lost_or_taken_twice_when_two_channels_become_ready_at_once(self):
        for channel in ("a", "b"):
            self.broker.subscribe(channel, "t")
        for _ in range(30):
            both = [self.thread(lambda: self.take("a", "b", wait=PATIENCE)) for _ in range(2)]
            until(lambda: count_waiting(self.broker, "b") == 2)
            self.broker.publish("t", b"x")
            taken = [future.result(PATIENCE)[0] for future in both]
            self.assertEqual(sorted(message.channel for message in taken), ["a", "b"])
            for message in taken:
                self.broker.delete(message.id)

    def test_a_wake_up_that_was_not_used_is_passed_on(self):
        both = self.thread(lambda: self.take("a", "b", wait=PATIENCE))
        until(lambda: count_waiting(self.broker, "b"))
        only = self.park("b")
        with busy(self.broker._committer):  # both channels become ready before a take
            for channel in ("b", "a"):
                self.broker.post_async(lambda _: None, channel, b"x")
        self.assertEqual(both.result(PATIENCE)[0].channel, "a")
        self.assertEqual(only.result(PATIENCE).channel, "b")

    def test_channels_at_once_are_bounded(self):
        with self.assertRaises(linger.BadRequest):
            self.take(*map(str, range(101)))


class BatchTest(BrokerTest):
    def items(self, *bodies, **parameters):
        return [(body, "text/plain", parameters) for body in bodies]

    def test_a_batch_is_added_in_order(self):
        self.assertEqual(self.broker.post_batch("q", self.items(b"1", b"2", b"3")), [1, 2, 3])
        self.assertEqual(self.bodies("q"), [b"1", b"2", b"3"])
        self.assertEqual(self.broker.counters["msg-add"], 3)

    def test_a_message_of_a_batch_has_no_parameters_of_another(self):
        self.broker.set_settings("q", timeout=60)
        own = self.items(b"2", priority=-1, delay=5, linger=9)
        self.broker.post_batch("q", self.items(b"1") + own + self.items(b"3"))
        self.clock.now += 5
        taken = self.broker.take(self.broker.consumer(["q"], 3))
        found = [(m.body, m.priority, m.linger, m.timeout) for m in taken]
        self.assertEqual(found, [(b"2", -1, 9, 60), (b"1", 0, 0, 60), (b"3", 0, 0, 60)])

    def test_a_batch_that_does_not_fit_makes_no_counters(self):
        self.restart(hlm=1)
        with self.assertRaises(linger.Full):
            self.broker.post_batch("q", self.items(b"1", b"2"))
        self.assertEqual(set(self.broker.statistics.events()), {""})

    def test_a_batch_delete_wakes_as_many_as_it_has_made_room_for(self):
        self.broker.set_settings("q", max_in_flight=2)
        self.broker.post_batch("q", self.items(b"1", b"2", b"3", b"4", b"5"))
        taken = self.broker.take(self.broker.consumer(["q"], 2))
        futures = [self.park("q") for _ in range(3)]
        self.broker.delete_batch([(m.id, m.lease) for m in taken])
        self.assertEqual([f.result(PATIENCE).body for f in futures[:2]], [b"3", b"4"])
        self.assertFalse(futures[2].done())
        self.broker.cancel_all()

    def test_a_batch_wakes_as_many_as_it_has(self):
        futures = [self.park("q") for _ in range(3)]
        self.broker.post_batch("q", self.items(b"1", b"2"))
        self.assertEqual([f.result(PATIENCE).body for f in futures[:2]], [b"1", b"2"])
        self.assertFalse(futures[2].done())
        self.broker.cancel_all()

    def test_a_bad_item_changes_nothing_and_is_named_by_its_index(self):
        items = self.items(b"1", b"2") + self.items(b"3", timeout=0)
        with self.assertRaisesRegex(linger.BadRequest, "timeout") as caught:
            self.broker.post_batch("q", items)
        self.assertEqual(caught.exception.index, 2)
        self.assertEqual(self.broker.channels(), [])

    def test_a_batch_fits_below_the_mark_or_not_at_all(self):
        self.restart(hlm=3)
        self.broker.post("q", b"0")
        for parameters in ({}, {"dedup": None}):
            with self.assertRaises(linger.Full):
                self.broker.post_batch("q", self.items(b"1", b"2", b"3", **parameters))
            self.assertEqual(self.broker.channel_stats("q")["ready"], 1)
        self.broker.post_batch("q", self.items(b"1", b"2"))
        with self.assertRaises(linger.Full):
            self.broker.post_batch("q", self.items(b"3"))

    def test_a_dedup_hit_in_a_batch_gives_the_first_id(self):
        first = self.broker.post("q", b"0", dedup="k").id
        items = self.items(b"1") + self.items(b"2", dedup="k") + self.items(b"3", unique="u") * 2
        ids = self.broker.post_batch("q", items)
        self.assertEqual(ids, [first + 1, first, first + 2, first + 2])
        self.assertEqual(self.bodies("q"), [b"0", b"1", b"3"])

    def test_a_batch_is_published_in_order(self):
        self.broker.subscribe("a", "t")
        self.broker.subscribe("b", "t")
        ids, dropped, kept = self.broker.publish_batch("t", self.items(b"1", b"2"))
        self.assertEqual((ids, dropped, [*kept]), ({"a": [1, 3], "b": [2, 4]}, [], []))
        self.assertEqual(self.bodies("b"), [b"1", b"2"])

    def test_a_take_of_several_that_finds_nothing_writes_nothing(self):
        changes = []
        for _ in range(3):
            self.assertEqual(self.broker.take(self.broker.consumer(["q"], 5)), [])
            changes.append(self.broker._store._writer.total_changes)
        self.assertEqual(changes[1:], changes[:1] * 2)

    def test_a_batch_delete_leaves_messages_that_are_not_in_the_channel_expected(self):
        self.broker.post_batch("q", self.items(b"1", b"2", b"3", b"4"))
        lease = self.broker.get("q").lease
        wanted = [(1, lease), (2, 7), (3, None), (4, None)]
        outcome = self.broker.delete_batch(wanted, {1: "q", 2: "q", 3: "r", 4: None, 5: "q"})
        self.assertEqual(outcome, ([1, 4], [2], [3]))

    def test_a_batch_delete_reports_the_outcome_of_each(self):
        self.broker.post_batch("q", self.items(b"1", b"2", b"3"))
        lease = self.broker.get("q").lease
        outcome = self.broker.delete_batch([(1, lease), (2, 7), (3, None), (9, None)])
        self.assertEqual(outcome, ([1, 3], [2], [9]))
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 0})


class SettingsTest(BrokerTest):
    def test_settings_hold_for_what_a_message_does_not_say(self):
        self.broker.set_settings("q", timeout=60, deliver=5, priority=2, linger=99, backoff="1,2")
        self.broker.post("q", b"x", priority=7)
        message = self.broker.get("q")
        self.assertEqual(message[2:5] + message[7:8], (7, 60, 5, 99))
        self.assertEqual(
            self.broker.settings("q"),
            {"timeout": 60, "deliver": 5, "priority": 2, "linger": 99, "backoff": "1,2"},
        )

    def test_a_subscriptions_own_parameters_win_over_settings(self):
        self.broker.set_settings("q", timeout=60, deliver=5, delay=9, dead="d")
        self.broker.subscribe("q", "t", timeout=7, delay=0)
        self.broker.publish("t", b"x")
        message = self.broker.get("q")
        self.assertEqual((message.timeout, message.deliver), (7, 5))
        self.broker.reject(message.id)
        self.assertIsNotNone(self.broker.get("d"))

    def test_a_subscription_without_a_delay_gets_that_of_the_settings(self):
        self.broker.set_settings("q", delay=9)
        self.broker.subscribe("q", "t")
        self.broker.publish("t", b"x")
        self.assertIsNone(self.broker.get("q"))
        self.clock.now += 9
        self.assertIsNotNone(self.broker.get("q"))

    def test_a_subscription_must_not_outlive_its_lingering_in_delay(self):
        self.broker.set_settings("q", linger=5, backoff="10,60", dead="d", hlm=9)
        self.broker.subscribe("q", "t", delay=4)
        with self.assertRaisesRegex(linger.BadRequest, "longer than delay"):
            self.broker.subscribe("q", "t", delay=10)

    def test_a_setting_that_would_lose_every_copy_gives_way_to_the_subscription(self):
        self.broker.subscribe("brief", "t", linger=5)
        self.broker.subscribe("late", "t", delay=9)
        self.broker.set_settings("brief", delay=5)
        self.broker.set_settings("late", linger=9, timeout=60)
        self.broker.publish("t", b"x")
        self.assertEqual(self.broker.get("brief").linger, 5)
        self.clock.now += 9
        message = self.broker.get("late")
        self.assertEqual((message.linger, message.timeout), (0, 60))

    def test_settings_replace_are_cleared_and_survive_a_restart(self):
        self.broker.set_settings("q", timeout=60, dead="d")
        self.broker.set_settings("q", deliver=2)
        self.restart()
        self.assertEqual(self.broker.settings("q"), {"deliver": 2})
        self.broker.clear_settings("q")
        self.restart()
        self.assertEqual(self.broker.settings("q"), {})

    def test_a_channel_has_its_own_mark(self):
        self.restart(hlm=1)
        self.broker.subscribe("other", "u")
        self.broker.post("other", b"1")
        self.broker.set_settings("q", hlm=2)
        self.broker.set_settings("free", hlm=0)
        for channel in ("q", "free"):
            self.broker.subscribe(channel, "t")
            self.broker.post(channel, b"1")
            self.broker.post(channel, b"2")
        with self.assertRaises(linger.Full):
            self.broker.post("q", b"3")
        published, dropped, _ = self.broker.publish("t", b"x")
        self.assertEqual((list(published), dropped), (["free"], ["q"]))

    def test_in_a_paused_channel_gets_wait_and_the_rest_goes_on(self):
        self.broker.pause("q")
        id = self.broker.post("q", b"x").id
        self.assertIsNone(self.broker.get("q"))
        future = self.park("q")
        self.broker.post("q", b"y")
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 2, "hidden": 0})
        self.broker.resume("q")
        self.assertEqual(future.result(PATIENCE).id, id)
        self.assertIsNotNone(self.broker.get("q"))

    def test_a_pause_that_ends_by_itself_wakes_waiting_consumers(self):
        self.broker.pause("q", 10)
        self.broker.post("q", b"1")
        self.broker.post("q", b"2")
        futures = [self.park("q") for _ in range(3)]
        self.clock.now += 10
        self.broker.process_due()
        self.assertEqual([f.result(PATIENCE).body for f in futures[:2]], [b"1", b"2"])
        self.assertFalse(self.broker.info("q")["paused"])
        self.broker.cancel_all()

    def test_a_pause_survives_a_restart(self):
        self.broker.pause("q")
        self.broker.post("q", b"x")
        self.restart()
        self.assertTrue(self.broker.info("q")["paused"])
        self.assertIsNone(self.broker.get("q"))
        self.assertIsNone(self.broker.get("q", auto=True))

    def test_of_several_channels_the_paused_ones_give_nothing(self):
        for channel in ("a", "b"):
            self.broker.post(channel, b"x")
        self.broker.pause("a")
        taken = self.broker.take(self.broker.consumer(["a", "b"]))
        self.assertEqual(taken[0].channel, "b")
        self.assertEqual(self.broker.take(self.broker.consumer(["a", "b"])), [])


class ConcurrencyTest(BrokerTest):
    """Channels of which only so many messages may be in flight."""

    def setUp(self):
        super().setUp()
        self.broker.set_settings("q", max_in_flight=2)
        for n in range(6):
            self.broker.post("q", b"%d" % n, timeout=10, deliver=3, dead="d")

    def fill(self):
        return [self.broker.get("q").id for _ in range(2)]

    def in_flight(self):
        return self.broker.info("q")["in-flight"]

    def test_a_waiting_consumer_gets_the_room_that_one_with_auto_leaves(self):
        self.fill()
        futures = [self.park("q", auto=auto) for auto in (True, False)]
        self.broker.delete(1)
        self.assertEqual([future.result(PATIENCE).id for future in futures], [3, 4])

    def test_no_more_than_the_limit_are_taken(self):
        self.assertEqual(self.fill(), [1, 2])
        self.assertIsNone(self.broker.get("q"))
        self.broker.delete(1)
        self.assertEqual(self.broker.get("q").id, 3)
        self.assertIsNone(self.broker.get("q"))

    def test_a_batch_is_as_large_as_what_is_left(self):
        for n, ids in ((1, [1]), (5, [2]), (5, [])):
            taken = self.broker.take(self.broker.consumer(["q"], n=n))
            self.assertEqual([message.id for message in taken], ids)
        self.broker.delete_batch([(1, None), (2, None)])
        self.assertEqual(len(self.broker.take(self.broker.consumer(["q"], n=1000))), 2)

    def test_a_batch_from_several_channels_is_as_large_as_what_is_left_in_its_channel(self):
        self.broker.post_batch("r", [(b"x", "text/plain", {})] * 4)
        self.broker.set_settings("r", max_in_flight=3)
        self.broker.get("q")
        for ids in ([2], [7, 8, 9], []):
            taken = self.broker.take(self.broker.consumer(["none", "q", "r"], n=5))
            self.assertEqual([message.id for message in taken], ids)
        self.broker.set_settings("r", max_in_flight=0)
        self.assertEqual(len(self.broker.take(self.broker.consumer(["q", "r"], n=5))), 1)

    def test_what_is_deleted_on_delivery_is_held_back_as_well(self):
        self.broker.get("q")
        consumer = self.broker.consumer(["q"], n=5, auto=True)
        self.assertEqual(len(self.broker.take(consumer)), 1)
        self.broker.get("q")
        self.assertEqual(self.broker.take(self.broker.consumer(["q"], auto=True)), [])

    def test_among_several_channels_a_full_one_is_passed_over(self):
        self.broker.post("r", b"x")
        self.fill()
        for channels in ("r", ""):
            taken = self.broker.take(self.broker.consumer(["q", "r"]))
            self.assertEqual("".join(message.channel for message in taken), channels)
        self.broker.delete(2)
        self.assertEqual(self.broker.take(self.broker.consumer(["q", "r"]))[0].id, 3)

    def ways_to_end(self):
        """What ends the flight of message 1."""
        consumer = self.broker.consumer(["q"])
        message = self.broker.read_message(1)[0]
        yield lambda: self.broker.delete(1)
        yield lambda: self.broker.delete_batch([(1, None)])
        yield lambda: self.broker.take(self.broker.consumer(["empty"]), ack=1)
        yield lambda: self.broker.release(1)
        yield lambda: self.broker.release(1, delay=50)
        yield lambda: self.broker.reject(1)
        yield lambda: self.broker.undo_take(consumer, [message])
        yield self.time_out

    def time_out(self):
        self.broker.touch(2, timeout=99)
        self.clock.now += 10
        self.broker.process_due()

    def test_each_end_of_a_flight_wakes_a_consumer_that_waits(self):
        for number in range(8):
            with self.subTest(number):
                self.setUp()
                self.fill()
                waiting = self.park("q")
                list(self.ways_to_end())[number]()
                message = waiting.result(PATIENCE)
                self.assertIn(message.id, (1, 3))
                self.assertEqual(self.in_flight(), 2)
                self.broker.close()

    def test_a_backoff_and_a_last_timeout_make_room_too(self):
        for options in ({"backoff": "60"}, {"deliver": 1}, {"linger": 5}):
            self.broker.drain("q")
            for _ in range(3):
                self.broker.post("q", b"x", timeout=10, **options)
            self.broker.get("q")
            second = self.broker.get("q").id
            self.broker.touch(second, timeout=99)
            self.broker.post("q", b"last")
            waiting = self.park("q")
            self.clock.now += 10
            self.broker.process_due()
            self.assertIsNotNone(waiting.result(PATIENCE), options)

    def test_a_drain_makes_room_for_what_comes_later(self):
        self.fill()
        self.broker.drain("q")
        self.broker.post("q", b"later")
        self.assertEqual(self.broker.get("q").body, b"later")

    def test_a_drain_makes_room_for_what_was_posted_after_it_began(self):
        self.fill()
        waiting = self.park("q")
        values = {"channel": "q", "scope": "", "batch_scope": "", "newest_key": 0, "n": 9}
        drain = linger.Drain(self.broker._state, {**values, "newest": 2, "now": self.clock.now})
        self.assertEqual(self.broker._committer.run(drain), 2)
        self.assertEqual(waiting.result(PATIENCE).id, 3)

    def test_each_channel_has_its_own_limit(self):
        self.broker.set_settings("r", max_in_flight=1)
        self.broker.post_batch("r", [(b"x", "text/plain", {})] * 2)
        self.assertEqual(self.bodies("r"), [b"x"])
        self.assertEqual(self.fill(), [1, 2])
        self.assertIsNone(self.broker.get("q"))

    def test_a_late_touch_needs_room(self):
        self.fill()
        self.clock.now += 10
        self.assertEqual(self.fill(), [1, 2])
        self.broker.release(1, delay=5)
        self.clock.now += 5
        third = self.broker.get("q")
        self.assertEqual(third.id, 1)
        self.clock.now += 5
        self.broker.post("q", b"first", priority=-1)
        self.assertEqual(self.broker.get("q").body, b"first")
        with self.assertRaisesRegex(linger.Conflict, "message 2 is not in flight"):
            self.broker.touch(2)
        self.broker.delete(1)
        self.broker.touch(2)
        self.assertEqual(self.in_flight(), 2)

    def test_a_change_of_the_limit_wakes_those_that_wait(self):
        self.fill()
        waiting = [self.park("q") for _ in range(4)]
        self.broker.change_settings("q", max_in_flight=4)
        self.assertEqual([w.result(PATIENCE).id for w in waiting[:2]], [3, 4])
        self.assertEqual(count_waiting(self.broker), 2)
        self.broker.change_settings("q", max_in_flight=1)
        self.broker.delete_batch([(1, None), (2, None), (3, None)])
        self.assertEqual((self.in_flight(), count_waiting(self.broker)), (1, 2))
        self.broker.clear_settings("q")
        self.assertEqual([w.result(PATIENCE).id for w in waiting[2:]], [5, 6])

    def test_the_limit_survives_a_restart_and_zero_is_none(self):
        self.restart()
        self.assertEqual(self.broker.settings("q"), {"max-in-flight": 2})
        self.fill()
        self.assertIsNone(self.broker.get("q"))
        self.broker.set_settings("q", max_in_flight=0)
        self.broker.pause("other")
        self.assertEqual(len(self.bodies("q")), 4)

    def test_a_change_of_a_message_passes_no_limit(self):
        self.fill()
        waiting = self.park("q")
        self.broker.change(3, delay=5)
        self.broker.change(3, delay=0, priority=-1)
        self.assertEqual((self.in_flight(), count_waiting(self.broker)), (2, 1))
        self.broker.delete(1)
        self.assertEqual(waiting.result(PATIENCE).id, 3)

    def test_of_consumers_that_race_only_so_many_get_one(self):
        with self.stopped_ticker(), busy(self.broker._committer):
            takes = [self.thread(self.broker.get, "q", 0) for _ in range(6)]
            until(lambda: len(self.broker._committer._pending) == 6)
        self.assertEqual(sum(t.result(PATIENCE) is not None for t in takes), 2)

    def test_a_usual_take_of_another_channel_runs_the_usual_statements(self):
        state = self.broker._state
        take = linger.Take(state, self.broker.consumer(["r"]), self.clock.now)
        self.assertEqual(take.statements, (linger.NEXT_MESSAGE, linger.LEASE_NEXT))
        self.assertFalse(take.durable)
        take = linger.Take(state, self.broker.consumer(["r", "s"]), self.clock.now)
        self.assertEqual(take.statements, linger.BATCH_TAKES[0])
        take = linger.Take(state, self.broker.consumer(["q"]), self.clock.now)
        self.assertTrue(take.durable)  # or more than the limit may be in flight after a power cut
        self.broker.clear_settings("q")
        take = linger.Take(state, self.broker.consumer(["q"]), self.clock.now)
        self.assertEqual(take.statements, (linger.NEXT_MESSAGE, linger.LEASE_NEXT))


class CallReplyTest(BrokerTest):
    """Request and reply, and waiting for the end of a channel."""

    def call(self, *arguments, broker=None, wait=PATIENCE, **options):
        """A call that waits, as a future, and the message as its worker has it."""
        broker = broker or self.broker
        future = self.thread(
            lambda: broker.calls.call("q", b"2 + 3", "text/sum", wait, *arguments, **options)
        )
        until(lambda: future.done() or broker.channel_stats("q")["ready"])
        return future, self.broker.get("q")

    def abandoned_call(self):
        """The message of a call whose client has gone after the delivery."""
        gone = threading.Event()
        call, message = self.call(is_disconnected=gone.is_set)
        gone.set()
        self.assertIsInstance(call.exception(PATIENCE), linger.OutcomeUnknown)
        return message

    def replies(self):
        return self.broker._committer.read("select id, body from replies")[0]

    def test_a_reply_goes_to_the_caller_and_the_message_is_gone(self):
        call, message = self.call(headers={"a": "1"})
        self.assertEqual((message.body, message.type), (b"2 + 3", "text/sum"))
        self.assertEqual((message.reply_to, message.headers), ("/messages/1/reply", {"a": "1"}))
        self.broker.calls.reply(1, b"5", "text/number", lease=1)
        self.assertEqual(call.result(PATIENCE), (b"5", "text/number"))
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 0})

    def test_without_a_reply_in_time_an_undelivered_message_is_deleted(self):
        with self.assertRaisesRegex(linger.OutcomeUnknown, "no reply to message 1"):
            self.broker.calls.call("q", b"x", "x", 0, group="g")
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 0})
        self.assertEqual(self.broker.counters["msg-delete"], 1)
        message = self.abandoned_call()
        with self.assertRaises(linger.NotFound):
            self.broker.calls.reply(message.id, b"late", expected_channel="other")
        self.broker.calls.reply(message.id, b"late")

    def test_a_call_that_was_moved_is_left_where_it_is(self):
        gone = threading.Event()
        call = self.thread(lambda: self.broker.calls.call("q", b"x", is_disconnected=gone.is_set))
        until(lambda: self.broker.channel_stats("q")["ready"])
        self.broker.redrive_message(1, "r")
        gone.set()
        self.assertIsInstance(call.exception(PATIENCE), linger.OutcomeUnknown)
        self.assertEqual(self.broker.channel_stats("r"), {"ready": 1, "hidden": 0})

    def test_a_withdrawn_call_lets_the_next_of_its_group_come(self):
        with self.assertRaises(linger.OutcomeUnknown):
            taken = functools.partial(self.broker.post, "q", b"next", group="g")
            self.broker.calls.call("q", b"x", "x", PATIENCE, taken, group="g")
        self.assertEqual(self.broker.get("q").body, b"next")

    def test_what_is_given_up_ends_the_call_with_its_reason(self):
        for dead in ("", "d"):
            for end in (
                lambda id: self.broker.reject(id, reason="no such order"),
                lambda id: self.broker.release(id),
                lambda id: self.broker.delete(id),
            ):
                call, message = self.call(dead=dead, deliver=1)
                end(message.id)
                error = call.exception(PATIENCE)
                self.assertEqual(error.status, 502)
        self.assertIn("given up (deleted)", str(error))

    def test_the_reason_of_a_rejection_is_in_the_error(self):
        call, message = self.call(dead="d")
        self.broker.reject(message.id, reason="no such order")
        self.assertIn("given up (reject): no such order", str(call.exception(PATIENCE)))

    def test_a_call_waits_over_failed_deliveries(self):
        call, message = self.call()
        self.broker.release(message.id)
        again = self.broker.get("q")
        with self.assertRaisesRegex(linger.Conflict, "overtaken"):
            self.broker.calls.reply(message.id, b"x", lease=message.lease)
        self.broker.calls.reply(message.id, b"5", lease=again.lease)
        self.assertEqual(call.result(PATIENCE)[0], b"5")

    def test_only_one_reply_counts_and_only_to_a_call(self):
        call, message = self.call()
        self.broker.calls.reply(message.id, b"5")
        call.result(PATIENCE)
        with self.assertRaisesRegex(linger.Conflict, "replied to already"):
            self.broker.calls.reply(message.id, b"5")
        plain = self.broker.post("q", b"x", headers={"a": "x-linger-reply-to: no"}).id
        with self.assertRaisesRegex(linger.Conflict, "nobody waits"):
            self.broker.calls.reply(plain, b"5")
        with self.assertRaises(linger.NotFound):
            self.broker.calls.reply(99, b"5")
        for key in ("dedup", "unique"):
            with self.assertRaisesRegex(linger.BadRequest, key):
                self.broker.calls.call("q", b"x", **{key: "k"})

    def test_a_reply_for_which_nobody_waits_is_not_kept(self):
        with self.assertRaises(linger.OutcomeUnknown):
            self.broker.calls.call("q", b"x", "x", PATIENCE, is_disconnected=lambda: True)
        self.assertIsNone(self.broker.get("q"))
        message = self.abandoned_call()
        self.restart()
        self.broker.calls.reply(message.id, b"late")
        end = self.clock.now + linger.REPLY_TTL
        self.assertEqual(self.broker._state.timers._moments[linger.ALL], end)
        self.restart()
        self.clock.now = end - 1
        self.broker.process_due()
        self.assertEqual(len(self.replies()), 1)
        self.clock.now = end
        self.broker.process_due()
        self.assertEqual(self.replies(), [])

    def test_old_replies_are_deleted_in_pieces_without_a_pause(self):
        for id in range(3):
            values = ("insert into replies values (:id, '', '', 0)",), {"id": id}
            self.broker._committer.run(linger.Operation(*values))
        self.broker._state.due_piece.rows = 2
        self.broker.process_due()
        self.assertEqual(self.replies(), [])

    def test_a_long_reply_is_dropped_when_its_caller_has_it(self):
        for body, kept in ((b"5", b"5"), (b"x" * (linger.KEPT_REPLY + 1), b"")):
            call, message = self.call()
            self.broker.calls.reply(message.id, body)
            self.assertEqual(call.result(PATIENCE)[0], body)
            self.assertEqual(self.replies()[-1], (message.id, kept))

    def test_many_calls_get_each_its_own_reply(self):
        calls = [self.thread(lambda n=n: self.broker.calls.call("q", b"%d" % n)) for n in range(30)]
        for _ in calls:
            message = self.broker.get("q", PATIENCE)
            self.broker.calls.reply(message.id, b"re: " + message.body)
        replies = [call.result(PATIENCE)[0] for call in calls]
        self.assertEqual(replies, [b"re: %d" % n for n in range(30)])

    def test_an_empty_channel_is_drained(self):
        self.assertTrue(self.broker.calls.drained("q", 0))
        self.broker.post("q", b"x", dead="d")
        self.assertFalse(self.broker.calls.drained("q", 0))
        waiting = [self.thread(self.broker.calls.drained, "q", PATIENCE) for _ in range(20)]
        self.broker.release(self.broker.get("q").id, delay=9)
        self.assertFalse(self.broker.calls.drained("q", 0.1))
        self.clock.now += 9
        self.broker.reject(self.broker.get("q").id)
        self.assertEqual([w.result(PATIENCE) for w in waiting], [True] * 20)
        self.assertFalse(self.broker.calls.drained("d", 0))

    def test_those_who_wait_are_woken_and_do_not_only_look_again(self):
        self.hasten(LOOK_PAUSE=2 * PATIENCE, LONGEST_PAUSE=2 * PATIENCE)
        call, message = self.call(wait=2 * PATIENCE)
        drained = [self.thread(self.broker.calls.drained, "q", 2 * PATIENCE) for _ in range(2)]
        until(lambda: len(self.broker.calls._waits._wakeups.get("drained q", ())) == 2)
        self.broker.calls.reply(message.id, b"5")
        self.assertEqual(call.result(PATIENCE)[0], b"5")
        self.broker.calls.drained("q", 0)  # it sees the end, and wakes the others
        self.assertEqual([future.result(PATIENCE) for future in drained], [True] * 2)
        self.assertEqual(
            (self.broker.calls._waits._wakeups, self.broker.calls._waits._count), ({}, 0)
        )

    def test_who_was_woken_wakes_no_others(self):
        self.hasten(LOOK_PAUSE=2 * PATIENCE, LONGEST_PAUSE=2 * PATIENCE)
        waits, looks, found = linger.Waits(bool), [], []
        look = lambda: looks.append(1) or (found or None)  # noqa: E731
        waiting = [self.thread(waits.wait, "key", look, 2 * PATIENCE, bool) for _ in range(9)]
        until(lambda: len(looks) == 9)
        with unittest.mock.patch.object(waits, "notify", wraps=waits.notify) as notify:
            found.append("it")
            waits.wait("key", look, 0, bool)
            self.assertEqual([w.result(PATIENCE) for w in waiting], [["it"]] * 9)
        self.assertEqual(notify.call_count, 1)

    def test_what_wakes_nobody_is_found_by_looking_again(self):
        self.hasten(LONGEST_PAUSE=2 * PATIENCE)
        self.broker.post("q", b"x")
        waiting = self.thread(self.broker.calls.drained, "q", 2 * PATIENCE)
        until(lambda: self.broker.calls._waits._count)
        self.broker.delete(1)
        self.assertTrue(waiting.result(PATIENCE))

    def test_the_more_wait_the_more_rarely_each_looks(self):
        self.hasten(LOOK_PAUSE=0.01, LOOKS_AT_ONCE=1, LONGEST_PAUSE=PATIENCE)
        waits, looks = linger.Waits(bool), []
        waits._count = 50
        waits.wait("key", lambda: looks.append(1), 0.1, bool)
        self.assertEqual(len(looks), 2)  # at the begin and at the end

    def test_a_pause_between_looks_holds_up_neither_a_stop_nor_the_end(self):
        self.hasten(LOOK_PAUSE=2 * PATIENCE, LONGEST_PAUSE=0.05)
        waits = linger.Waits(iter((False, True)).__next__)  # it stops after the first look
        waiting = self.thread(waits.wait, "key", lambda: None, 2 * PATIENCE, bool)
        self.assertIsInstance(waiting.exception(PATIENCE), linger.Unavailable)
        self.hasten(LONGEST_PAUSE=2 * PATIENCE)
        found = self.thread(linger.Waits(bool).wait, "key", lambda: None, 0.1, bool)
        self.assertIsNone(found.result(PATIENCE))

    def test_a_reply_that_comes_at_the_last_moment_counts(self):
        def reply(*_):
            self.broker.calls.reply(self.broker.get("q").id, b"5")

        with unittest.mock.patch.object(self.broker.calls._waits, "wait", side_effect=reply):
            self.assertEqual(self.broker.calls.call("q", b"x")[0], b"5")

    def test_a_change_during_a_look_is_not_missed(self):
        self.hasten(LOOK_PAUSE=2 * PATIENCE, LONGEST_PAUSE=2 * PATIENCE)
        waits, looks = linger.Waits(bool), iter((None, "found"))
        look = lambda: waits.notify("key") or next(looks)  # noqa: E731
        found = self.thread(waits.wait, "key", look, 2 * PATIENCE, bool)
        self.assertEqual(found.result(PATIENCE), "found")

    def test_a_stop_ends_those_who_wait(self):
        self.broker.post("r", b"x")
        waiting = self.thread(self.broker.calls.drained, "r", PATIENCE)
        delivered, message = self.call()
        call = self.thread(self.broker.calls.call, "q", b"x")
        until(lambda: self.broker.channel_stats("q")["ready"])
        self.broker.cancel_all()
        for future in (waiting, call):  # that message is deleted: nothing has changed
            self.assertIsInstance(future.exception(PATIENCE), linger.Unavailable)
        error = delivered.exception(PATIENCE)
        self.assertIsInstance(error, linger.OutcomeUnknown)
        self.assertIn("to message 2 has come: the server stops", str(error))
        self.restart()
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 1})
        self.broker.calls.reply(message.id, b"5", lease=message.lease)

    def test_a_call_whose_database_fails_does_not_say_that_nothing_changed(self):
        with (
            unittest.mock.patch.object(
                self.broker.calls, "_withdraw", side_effect=linger.Unavailable("full")
            ),
            self.assertRaisesRegex(linger.OutcomeUnknown, "message 1 has come: full"),
        ):
            self.broker.calls.call("q", b"x", wait=0)

    def test_a_call_outlives_a_worker_that_dies(self):
        for options in ({"timeout": 5}, {"timeout": 5, "deliver": 1, "dead": "d"}):
            call, message = self.call(**options)
            self.clock.now += 5
            self.broker.process_due()
            if again := self.broker.get("q"):
                self.assertEqual((again.id, again.delivered), (message.id, 2))
                self.broker.calls.reply(again.id, b"5", lease=again.lease)
                self.assertEqual(call.result(PATIENCE)[0], b"5")
        self.assertIn("given up (deliver)", str(call.exception(PATIENCE)))

    def test_a_group_takes_its_turn_with_each_reply(self):
        calls = [self.call(group="g")]
        calls.append((self.thread(lambda: self.broker.calls.call("q", b"x", group="g")), None))
        until(lambda: self.broker.info("q")["blocked"])
        for call, message in calls:
            message = message or self.broker.get("q")
            self.assertIsNone(self.broker.get("q"))
            self.broker.calls.reply(message.id, b"5")
            self.assertEqual(call.result(PATIENCE)[0], b"5")


class GroupTest(BrokerTest):
    """Messages of a group are delivered in the order of their posts, one at a time."""

    STEPS = 600

    def setUp(self):
        super().setUp()
        for n in range(1, 7):  # 1, 3 and 5 are of the group a, the others of b
            self.broker.post("q", b"%d" % n, group="ab"[(n + 1) % 2], timeout=10, dead="d")

    def states(self, channel="q"):
        return [state for _, state in self.broker.list_messages(channel)]

    def take(self, n=9):
        """The ids of what is ready, taken."""
        return [m.id for m in self.broker.take(self.broker.consumer(["q"], n))]

    def check(self):
        """What must be so after every call."""
        rows, counts, wrong = self.broker._committer.read(
            "select channel, group_key, count(*) - sum(blocked), count(*), min(state) from messages"
            " where group_key <> '' and dead_from = '' group by channel, group_key",
            "select name, (select count(*) from messages where channel = name and blocked),"
            " blocked, (select count(*) from messages where channel = name and state = 2), delayed"
            " from channels",
            "select * from messages where blocked <> (due_at > 5e11) or due_at > 15e11"
            " or blocked and (state <> 2 or leased or group_key = '' or dead_from <> '')",
        )
        self.assertEqual([row for row in rows if row[2] != 1], [])
        self.assertEqual([row for row in counts if row[1:5:2] != row[2:5:2]], [])
        self.assertEqual(wrong, [])

    def test_the_first_of_each_group_is_ready_and_the_others_are_blocked(self):
        self.assertEqual(self.states(), ["ready"] * 2 + ["blocked"] * 4)
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 2, "hidden": 4})
        info = self.broker.info("q")
        self.assertEqual((info["ready"], info["delayed"], info["blocked"]), (2, 0, 4))
        self.assertEqual(len(self.broker.list_messages("q", "blocked")), 4)
        self.assertEqual(self.broker.list_messages("q", "delayed"), [])
        self.assertEqual(self.broker.counters["msg-show"], 0)  # blocked ones are not shown
        self.assertEqual(self.take(), [1, 2])
        self.assertEqual(self.take(), [])

    def test_one_that_is_posted_as_a_consumer_begins_to_wait_is_handed_to_it(self):
        with busy(self.broker._committer):
            taken = queue.SimpleQueue()
            self.broker.take_async(taken.put, self.broker.consumer(["r"]), PATIENCE)
            self.broker.post_async(bool, "r", b"x", group="a")
        self.assertEqual(taken.get(timeout=PATIENCE).result()[0].group, "a")

    def test_the_last_release_lets_the_next_one_come(self):
        self.broker.change(1, deliver=1)
        self.take()
        waiting = self.park("q")
        self.broker.release(1)
        self.assertEqual(waiting.result(PATIENCE).id, 3)

    def test_a_drain_lets_come_what_was_posted_after_it_began(self):
        self.take()
        waiting = self.park("q")
        values = {"channel": "q", "scope": "", "batch_scope": "", "newest_key": 0, "n": 9}
        drain = linger.Drain(self.broker._state, {**values, "newest": 2, "now": self.clock.now})
        self.assertEqual(self.broker._committer.run(drain), 2)
        self.assertEqual(waiting.result(PATIENCE).id, 3)

    def test_the_end_of_a_plain_message_runs_nothing_for_groups(self):
        for _ in range(4):
            self.broker.post("r", b"x", deliver=1)
        with unittest.mock.patch.object(self.broker._committer, "join_transaction") as join:
            for end in (self.broker.delete, self.broker.release, self.broker.reject):
                end(self.broker.get("r").id)
            self.broker.get("r", auto=True)
        join.assert_not_called()

    def ends(self):
        """The ways in which message 1, which is in flight, can leave its group."""
        yield lambda: self.broker.delete(1)
        yield lambda: self.broker.delete(1, lease=1)
        yield lambda: self.broker.delete_batch([(1, 1), (99, None)])
        yield lambda: self.broker.take(self.broker.consumer(["none"]), ack=1)
        yield lambda: self.broker.reject(1)
        self.broker.release(1, delay=99)
        yield lambda: self.broker.redrive_message(1, "r")

    def test_the_next_one_comes_when_the_one_before_has_left(self):
        for number in range(6):
            with self.subTest(number):
                self.broker.close()
                self.dbfile = str(self.folder / f"{number}.db")
                self.setUp()
                self.assertEqual(self.take(), [1, 2])
                if number > 2:  # this server does not know any more that it is of a group
                    self.broker._state.flights = linger.Flights()
                waiting = self.park("q")
                next(itertools.islice(self.ends(), number, None))()
                self.assertEqual(waiting.result(PATIENCE).id, 3)
                self.check()

    def test_the_next_one_comes_when_a_ready_one_has_left(self):
        self.broker.redrive("q", 1, to="r")
        self.assertEqual(self.take(), [2, 3])
        self.broker.release(3)
        self.assertEqual(self.broker.get("q", auto=True).id, 3)
        self.assertEqual(self.take(), [5])
        self.check()

    def test_a_failure_keeps_its_place(self):
        self.take()
        self.broker.release(1)
        self.assertEqual(self.take(), [1])
        self.broker.release(1, delay=5)
        self.assertEqual(self.take(), [])
        self.clock.now += 5
        self.assertEqual(self.take(), [1])
        self.clock.now += 10
        self.broker.touch(1)
        self.assertEqual(self.take(), [2])
        self.check()

    def test_a_delay_of_the_first_holds_the_others_up(self):
        self.broker.post("r", b"x", group="a", delay=10)
        self.broker.post("r", b"x", group="a")
        self.broker.post("r", b"x", group="a", delay=15)
        self.assertIsNone(self.broker.get("r"))
        self.clock.now += 10
        self.broker.delete(self.broker.get("r").id)
        self.broker.delete(self.broker.get("r").id)
        self.assertEqual(self.states("r"), ["delayed"])
        self.assertEqual(self.broker.list_messages("r")[0][0].delay, 5)
        self.clock.now += 5
        self.assertEqual(self.broker.get("r").id, 9)

    def test_priority_is_between_groups_not_within_one(self):
        self.broker.post("q", b"7", group="b", priority=-9)
        self.broker.post("q", b"8", group="c", priority=-1)
        self.assertEqual([self.broker.get("q").id for _ in range(3)], [8, 1, 2])
        self.broker.delete_batch([(2, None), (4, None), (6, None)])
        self.assertEqual(self.broker.get("q").id, 7)

    def test_last_deliveries_and_expiry_let_the_next_one_come(self):
        for options in ({"deliver": 1}, {"linger": 5}):
            for dead in ("", "d"):
                self.broker.drain("q")
                for _ in range(2):
                    self.broker.post("q", b"x", group="a", timeout=10, dead=dead, **options)
                last = self.broker.post("q", b"last", group="a").id
                first = self.broker.get("q").id
                self.clock.now += 10
                taken = self.take()
                self.assertEqual(len(taken), 1)
                self.assertEqual(taken[0] == last, "linger" in options)
                self.assertGreater(taken[0], first)
                self.check()

    def test_a_blocked_one_that_expires_or_is_deleted_lets_nobody_come(self):
        self.broker.post("q", b"7", group="a", linger=5, dead="d")
        self.broker.post("q", b"8", group="a", linger=5)
        self.take()
        self.broker.delete(3)
        self.broker.reject(5)
        self.clock.now += 5
        self.assertEqual(self.take(), [])
        self.assertEqual(self.states(), ["hidden"] * 2 + ["blocked"] * 2)
        self.check()

    def test_dead_letters_are_free_and_come_back_in_their_order(self):
        self.take()
        self.broker.reject(1)
        self.broker.reject(3)
        self.assertEqual(self.states("d"), ["ready"] * 2)
        self.assertEqual(self.broker.get("d").group, "a")
        self.broker.release(1)
        self.assertEqual(self.take(), [5])
        self.broker.redrive("d")
        self.assertEqual(self.take(), [])  # 5 is in flight
        self.broker.release(5)
        self.assertEqual(self.take(), [5])
        self.broker.delete(5)
        self.assertEqual(self.take(), [1])
        self.check()

    def test_a_dead_letter_neither_blocks_nor_is_blocked(self):
        self.broker.reject(1)
        self.broker.reject(5)
        self.broker.post("d", b"7", group="a")
        self.assertEqual(self.states("d"), ["ready"] * 3)
        self.broker.redrive_message(3, "d")
        for _ in range(2):
            self.assertEqual(self.states("d"), ["ready"] * 3 + ["blocked"])
            consumer = self.broker.consumer(["d"], 3, auto=True)
            self.broker.undo_take(consumer, self.broker.take(consumer))
            self.check()
        self.broker.delete(1)
        self.assertEqual(self.states("d"), ["ready"] * 2 + ["blocked"])

    def test_one_that_comes_back_goes_before_what_waits(self):
        self.take()
        self.broker.reject(1)
        self.assertEqual(self.states()[1], "ready")
        self.broker.redrive_message(1)
        self.assertEqual(self.states(), ["ready", "hidden", "blocked", "blocked"] + ["blocked"] * 2)
        self.assertEqual(self.take(), [1])
        self.broker.delete(1)
        self.assertEqual(self.take(), [3])

    def test_what_waits_again_has_lost_its_delivery(self):
        self.take()
        self.broker.reject(1)
        self.take()
        self.clock.now += 10
        self.broker.process_due()
        self.broker.redrive_message(1)
        with self.assertRaises(linger.Conflict):
            self.broker.touch(3, lease=1)
        with self.assertRaises(linger.Conflict):
            self.broker.release(3, lease=1)
        self.check()
        self.broker.delete(3, lease=1)
        self.check()

    def test_an_undone_take_goes_back_to_its_place(self):
        for auto in (False, True):
            consumer = self.broker.consumer(["q"], auto=auto)
            taken = self.broker.take(consumer)
            if auto:
                self.assertEqual(self.states()[1], "ready")  # the next of its group
            self.broker.undo_take(consumer, taken)
            self.check()
            self.assertEqual(self.states(), ["ready"] * 2 + ["blocked"] * 4)
        consumer = self.broker.consumer(["q"], auto=True)
        taken = self.broker.take(consumer)
        self.take()
        self.broker.undo_take(consumer, taken)
        self.assertEqual(self.states(), ["blocked", "hidden", "hidden"] + ["blocked"] * 3)
        self.check()

    def test_what_waits_for_an_undone_take_has_lost_its_delivery(self):
        consumer = self.broker.consumer(["q"], auto=True)
        taken = self.broker.take(consumer)
        late = [self.broker.get("q") for _ in range(2)][1]
        self.clock.now += 10
        self.broker.process_due()
        self.broker.undo_take(consumer, taken)
        with self.assertRaises(linger.Conflict):
            self.broker.touch(late.id, lease=late.lease)
        self.check()

    def test_an_undone_take_waits_for_one_that_came_back_meanwhile(self):
        self.broker.reject(1)
        consumer = self.broker.consumer(["q"], 2, auto=True)
        taken = self.broker.take(consumer)
        self.broker.redrive_message(1)
        self.broker.undo_take(consumer, taken)
        self.assertEqual(self.states()[:3], ["ready", "ready", "blocked"])
        self.check()

    def test_a_change_keeps_the_order(self):
        self.broker.change(3, delay=0, priority=-5)
        self.assertEqual(self.broker.counters["msg-show"], 0)  # it is still blocked
        self.broker.change(5, delay=50)
        self.assertEqual(self.take(), [1, 2])
        self.broker.change(3, priority=-9, delay=20)
        self.broker.delete(1)
        self.clock.now += 9
        self.assertEqual(self.take(), [])
        self.clock.now += 11
        self.assertEqual(self.take(), [3, 2])
        self.broker.delete(3)
        self.assertEqual(self.broker.read_message(5)[0].delay, 30)
        self.broker.change(5, delay=0)
        self.assertEqual(self.take(), [5])
        self.check()

    def test_a_drain_and_a_restart_leave_groups_right(self):
        self.take()
        self.restart()
        self.broker.delete(1)
        self.assertEqual(self.take(), [3])
        self.broker.drain("q")
        self.check()
        self.broker.post("q", b"x", group="a")
        self.assertEqual(self.take(), [7])

    def test_a_restart_finds_one_whose_turn_it_is(self):
        self.take()
        self.broker._committer.run(linger.Operation((linger.DELETE_MESSAGE,), {"id": 1}))
        self.restart()
        self.assertEqual(self.take(), [3])

    def test_a_batch_a_mark_and_a_publication_block_as_well(self):
        items = [(b"x", "text/plain", {"group": group}) for group in ("a", "a", "c", "c")]
        self.broker.set_settings("r", hlm=5)
        for channel in "rs":
            self.broker.post_batch(channel, items)
            self.assertEqual(self.states(channel), ["ready", "blocked"] * 2)
        self.broker.drain("s")
        self.broker.subscribe("r", "t")
        self.broker.subscribe("s", "t", delay=5)
        for _ in range(2):
            self.broker.publish("t", b"x", group="c")
        self.assertEqual(self.states("r"), ["ready", "blocked", "ready", "blocked", "blocked"])
        self.assertEqual(self.states("s"), ["delayed", "blocked"])
        self.check()
        with self.assertRaises(linger.Full):
            self.broker.post("r", b"x", group="c")

    def count_steps(self, call):
        """How many steps SQLite takes for a call."""
        steps, writer = [], self.broker._store._writer
        writer.set_progress_handler(lambda: steps.append(1), 1)
        call()
        writer.set_progress_handler(None, 1)
        return len(steps)

    def test_a_long_group_costs_no_more_than_a_short_one(self):
        self.broker.drain("q")
        self.broker._state.timers.stop()  # the ticker would add its own steps
        self.broker._state.timers.join()
        first, other = [self.broker.post("q", b"x", group=g, dead="d").id for g in ("long", "no")]
        self.broker.post("d", b"x")
        counts = []
        for length in (5, 500):
            self.broker.post_batch("q", [(b"x", "", {"group": "long"})] * length)
            counts.append([self.count_steps(call) for call in (
                lambda: self.broker.post("q", b"x", priority=-1),
                lambda: self.broker.delete(self.broker.get("q").id),
                lambda: self.broker.post("q", b"x", group="long"),
                lambda: self.broker.reject(first),
                lambda: self.broker.redrive_message(first),
                lambda: self.broker.redrive_message(other, "d"),
                lambda: self.broker.redrive_message(other, "q"),
            )])  # fmt: skip
        for short, long in zip(*counts):
            self.assertLess(long, short + 100, counts)  # they may share a transaction or not
        self.check()

    def test_only_a_message_has_a_group(self):
        for call in (self.broker.set_settings, self.broker.change_settings):
            with self.assertRaisesRegex(linger.BadRequest, "group can be given only"):
                call("q", group="a")
        for key in ("", "x" * 256, 7):
            with self.assertRaisesRegex(linger.BadRequest, "group must be a text"):
                self.broker.post("q", b"x", group=key)

    def test_a_group_and_a_limit_hold_together(self):
        self.broker.set_settings("q", max_in_flight=1)
        order = []
        while message := self.broker.get("q"):
            order.append(message.id)
            self.assertEqual(self.take(), [])
            self.broker.delete(message.id)
        self.assertEqual(order, [1, 2, 3, 4, 5, 6])

    def test_whatever_happens_each_group_has_one_that_is_not_blocked(self):
        chance = random.Random(5)
        for step in range(self.STEPS):
            ids = self.broker._committer.read("select id from messages")[0]
            with contextlib.suppress(linger.LingerError):
                self.step(chance, chance.choice([*ids, (1,)])[0], chance.choice("qrd"))
            if step % 5 == 0:
                self.check()
        self.broker.drain("q")
        self.check()
        self.clock.now += 1_000
        for channel in "rdrd":  # what times out in one of them may move to the other
            while taken := self.broker.take(self.broker.consumer([channel], 50)):
                self.broker.delete_batch([(message.id, None) for message in taken])
        self.assertEqual(self.broker.channels(), [])

    def step(self, chance, id, channel):
        chance.choice((
            lambda: self.broker.post(
                channel, b"x", group=chance.choice("abc"), timeout=chance.randint(1, 9),
                deliver=chance.randrange(3), linger=chance.choice((0, 0, 20)),
                delay=chance.choice((0, 0, 5)), dead=chance.choice(("", "d", "r")),
                backoff=chance.choice(("", "3,6")),
            ),
            lambda: self.take_and_undo(chance),
            lambda: self.broker.get(channel),
            lambda: self.broker.delete(id),
            lambda: self.broker.release(id, delay=chance.choice((None, 0, 4))),
            lambda: self.broker.reject(id),
            lambda: self.broker.touch(id),
            lambda: self.broker.redrive("d", chance.randint(1, 4)),
            lambda: self.broker.redrive_message(id, chance.choice((None, "r"))),
            lambda: self.broker.change(
                id, delay=chance.choice((None, 0, 5)), priority=chance.randrange(3)),
            lambda: setattr(self.clock, "now", self.clock.now + 3 * chance.random()),
        ))()  # fmt: skip

    def take_and_undo(self, chance):
        consumer = self.broker.consumer(
            ["q", "r"], n=chance.randint(1, 3), auto=chance.random() < 0.5
        )
        taken = self.broker.take(consumer)
        if taken and chance.random() < 0.6:
            self.broker.undo_take(consumer, taken)


class ChangeTest(BrokerTest):
    """Messages and settings that are changed in place."""

    def refused(self, reason, call, *arguments, **options):
        before = self.broker._committer.read("select * from messages", "select * from channels")
        with self.assertRaisesRegex(linger.LingerError, reason):
            call(*arguments, **options)
        after = self.broker._committer.read("select * from messages", "select * from channels")
        self.assertEqual(after, before)

    def test_a_message_that_waits_is_changed_in_place(self):
        for n in range(3):
            self.broker.post("q", b"%d" % n)
        self.broker.change(3, priority=-1, timeout=7, deliver=2, dead="d")
        self.broker.change(1, priority=1)
        totals = {n: self.broker.stats()[f"current-messages-{n}"] for n in ("urgent", "niced")}
        self.assertEqual(totals, {"urgent": 1, "niced": 1})
        message = self.broker.get("q")
        self.assertEqual(message[:6], (3, "q", -1, 7, 2, 1))
        self.broker.reject(3)
        self.assertEqual(self.broker.get("d").id, 3)
        self.assertEqual(self.bodies("q"), [b"1", b"0"])

    def test_a_delayed_one_stays_delayed_until_when_it_was(self):
        self.broker.post("q", b"x", delay=10)
        self.clock.now += 4
        self.broker.change(1, priority=-1, timeout=5)
        self.assertEqual(self.broker.read_message(1)[0].delay, 6)
        self.clock.now += 5.9
        self.assertIsNone(self.broker.get("q"))
        self.clock.now += 0.1
        self.assertEqual(self.broker.get("q").id, 1)

    def test_one_in_its_backoff_does_not_come_early(self):
        self.broker.post("q", b"x", backoff="60")
        self.broker.release(self.broker.get("q").id)
        self.broker.change(1, priority=5, timeout=5)
        self.clock.now += 59
        self.assertIsNone(self.broker.get("q"))

    def test_a_delay_counts_from_now_and_zero_makes_it_ready(self):
        self.broker.post("q", b"x")
        self.broker.change(1, delay=10)
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 1})
        self.clock.now += 9
        self.broker.change(1, delay=10)
        self.clock.now += 9
        self.assertIsNone(self.broker.get("q"))
        waiting = self.park("q")
        self.broker.change(1, delay=0)
        self.assertEqual(waiting.result(PATIENCE).id, 1)
        self.broker.release(1)
        shown = self.broker.counters["msg-show"]
        self.broker.change(1, delay=0)  # as it is
        self.assertEqual(self.broker.counters["msg-show"], shown)

    def test_a_delay_ends_in_time_for_a_consumer_that_waits(self):
        self.broker.post("q", b"x", delay=1000)
        self.broker.change(1, delay=5)
        waiting = self.park("q")
        self.clock.now += 5
        self.broker.process_due()
        self.assertEqual(waiting.result(PATIENCE).id, 1)

    def test_one_in_flight_is_refused_and_one_that_has_come_back_is_not(self):
        self.broker.post("q", b"x", timeout=5)
        self.refused("no message 2", self.broker.change, 2, priority=1)
        self.refused("no message 1", self.broker.change, 1, priority=1, expected_channel="r")
        self.refused("no message 1", self.broker.redrive_message, 1, "r", expected_channel="r")
        self.broker.get("q")
        self.refused("is in flight", self.broker.change, 1, priority=1)
        self.refused("is in flight", self.broker.redrive_message, 1, "r")
        self.clock.now += 5
        self.broker.change(1, delay=10)
        self.broker.delete(1, lease=1)

    def test_a_changed_message_keeps_its_unique_key(self):
        self.broker.post("q", b"x", unique="k")
        for options in ({"priority": 2}, {"delay": 5}, {"delay": 0, "dead": "d"}):
            self.broker.change(1, **options)
            self.assertEqual(self.broker.post("q", b"y", unique="k"), (1, True))

    def test_what_would_never_be_delivered_is_refused(self):
        self.broker.post("q", b"x", linger=20)
        self.broker.release(self.broker.get("q").id)
        self.refused("delivered 1 times", self.broker.change, 1, deliver=1)
        self.refused("expire before", self.broker.change, 1, delay=20)
        self.refused("one or more of priority, timeout, deliver, delay", self.broker.change, 1)
        self.refused("unknown parameter linger", self.broker.change, 1, linger=5)
        self.broker.change(1, deliver=0)
        self.broker.change(1, deliver=2, delay=19)
        self.clock.now += 19
        self.assertEqual(self.broker.get("q").deliver, 2)

    def test_a_change_survives_a_restart(self):
        self.broker.post("q", b"x", delay=50)
        self.broker.change(1, delay=5, priority=3)
        self.restart()
        self.clock.now += 5
        self.assertEqual(self.broker.get("q").priority, 3)

    def test_one_dead_letter_is_moved_back(self):
        for n in range(3):
            self.broker.post("q", b"%d" % n, dead="d", unique=str(n))
            self.broker.reject(self.broker.get("q").id)
        waiting = self.park("q")
        self.broker.redrive_message(2)
        self.assertEqual(waiting.result(PATIENCE)[:6], (2, "q", 0, 30, 0, 1))
        self.broker.release(self.broker.get("d").id, delay=60)
        self.broker.redrive_message(1)
        self.assertEqual(self.broker.get("q")[:6], (1, "q", 0, 30, 0, 1))
        self.broker.redrive_message(3, "r")
        self.assertEqual(self.broker.counters["msg-redrive"], 3)
        self.assertEqual(self.broker.get("r").dead_from, "")
        self.assertEqual(self.broker.channel_stats("d"), {"ready": 0, "hidden": 0})

    def test_only_a_dead_letter_is_moved_back(self):
        self.broker.post("q", b"x")
        self.refused("no dead letter", self.broker.redrive_message, 1)
        self.refused("in that channel already", self.broker.redrive_message, 1, "q")
        self.refused("no message", self.broker.redrive_message, 2)

    def test_what_is_moved_elsewhere_still_expires(self):
        for n in range(2):
            self.broker.post("q", b"x", linger=5 + n)
        self.broker.redrive_message(1, "r")
        self.broker.redrive("q", to="s")
        self.clock.now += 9
        self.assertEqual(self.broker.channels(), [])

    def test_a_change_of_one_setting_leaves_each_other_one(self):
        settings = {"priority": 1, "timeout": 2, "deliver": 3, "linger": 9, "delay": 5, "dead": "d",
                    "backoff": "6", "hlm": 7, "max-in-flight": 8}  # fmt: skip
        self.broker.set_settings("q", **settings)
        for name in ("deliver", "hlm"):
            settings[name] += 1
            self.broker.change_settings("q", **{name: settings[name]})
            for _ in range(2):
                self.assertEqual(self.broker.settings("q"), settings)
                self.restart()

    def test_settings_are_changed_one_by_one(self):
        self.broker.set_settings("q", timeout=60, dead="d")
        self.broker.change_settings("q", deliver=3, timeout=9)
        self.broker.change_settings("new", hlm=5)
        for _ in range(2):
            self.assertEqual(self.broker.settings("q"), {"timeout": 9, "deliver": 3, "dead": "d"})
            self.assertEqual(self.broker.settings("new"), {"hlm": 5})
            self.restart()
        self.broker.change_settings("q", linger=8)
        with self.assertRaisesRegex(linger.BadRequest, "longer than delay"):
            self.broker.change_settings("q", delay=8)
        with self.assertRaisesRegex(linger.BadRequest, "unique can be given only"):
            self.broker.change_settings("q", unique="u")


class LookingTest(BrokerTest):
    def test_reading_a_message_changes_nothing(self):
        id = self.broker.post("q", b"x").id
        delayed = self.broker.post("q", b"x", delay=5).id
        for _ in range(2):
            message, state = self.broker.read_message(id)
            self.assertEqual((message.delivered, message.lease, state), (0, 0, "ready"))
        self.broker.get("q")
        self.assertEqual(self.broker.read_message(id)[1], "hidden")
        self.assertEqual(self.broker.read_message(delayed)[1], "delayed")

    def test_ready_messages_are_listed_in_the_order_of_delivery_the_others_by_id(self):
        for n in range(6):
            self.broker.post("q", b"%d" % n, priority=-n % 3, delay=9 * (n > 3))
        self.broker.post("p", b"x")

        def ids(*arguments):
            return [message.id for message, _ in self.broker.list_messages("q", *arguments)]

        self.assertEqual(ids("ready"), [1, 4, 3, 2])
        self.assertEqual(ids("ready", 2), [1, 4])
        self.assertEqual(ids("ready", 2, 4), [3, 2])
        self.assertEqual(ids("delayed"), [5, 6])
        self.broker.get("q")
        self.assertEqual(ids("hidden"), [1])
        self.assertEqual(ids(None, 3), [1, 2, 3])
        self.assertEqual(ids(None, 3, 3), [4, 5, 6])
        with self.assertRaisesRegex(linger.BadRequest, "ready, hidden, delayed"):
            ids("odd")
        with self.assertRaises(linger.NotFound):
            ids("ready", 2, 99)

    def test_a_listing_of_few_messages_is_as_fast_beside_many(self):
        states = (None, "hidden", "delayed", "blocked")

        def listed(*states):
            steps, reader = [], self.broker._store._reader
            reader.set_progress_handler(lambda: steps.append(1), 1)
            lists = [
                [(message.id, state) for message, state in self.broker.list_messages("q", *options)]
                for options in itertools.product(states, (1, 9), (None, 2, 4))
            ]
            reader.set_progress_handler(None, 1)
            return lists, len(steps)

        for n in range(3):
            self.broker.post("q", b"x", group="g")
            self.broker.post("q", b"x", delay=n)
        self.broker.get("q")
        few = listed(*states)
        self.broker.post_batch("other", [(b"x", "", {})] * 500)
        self.assertEqual(listed(*states), few)
        self.hasten(MAX_SORTED=5)
        lists, steps = listed(*states)
        self.assertEqual(lists, few[0])
        self.assertGreater(steps, 500)
        hidden = listed(*states[1:])
        self.broker.post_batch("q", [(b"x", "", {})] * 500)
        self.assertEqual(listed(*states[1:]), hidden)

    def test_info_shows_all_of_a_channel(self):
        self.broker.set_settings("q", hlm=9)
        self.broker.subscribe("q", "t")
        self.broker.patterns.subscribe("q", "t.#")
        self.broker.post("q", b"old", priority=5)
        self.clock.now += 7
        self.broker.post("q", b"x", priority=-1)
        self.broker.post("q", b"x", delay=9)
        self.broker.get("q")
        self.assertEqual(
            self.broker.info("q"),
            {
                "channel": "q", "ready": 1, "delayed": 1, "blocked": 0, "in-flight": 1, "oldest": 7,
                "waiting": 0, "topics": ["t"], "patterns": ["t.#"], "paused": False,
                "settings": {"hlm": 9},
                "events": {"posted": 3, "delivered": 1, "deleted": 0, "failed": 0},
            },
        )  # fmt: skip
        self.assertIsNone(self.broker.info("empty")["oldest"])
        future = self.park("empty")
        self.assertEqual(self.broker.info("empty")["waiting"], 1)
        self.broker.cancel_all()
        future.result(PATIENCE)

    def test_info_finds_the_oldest_message_among_any_number_of_priorities(self):
        ages = [self.broker.info("q")["oldest"]]
        for priority in (3, 0, 7, -2):
            self.broker.post("q", b"x", priority=priority)
            self.clock.now += 1
        for _ in range(4):
            ages.append(self.broker.info("q")["oldest"])
            oldest = min(m.id for m, _ in self.broker.list_messages("q"))
            self.broker.delete(oldest)
        self.assertEqual(ages, [None, 4, 3, 2, 1])

    def test_channels_are_listed_by_name_by_ready_messages_and_by_age(self):
        self.hasten(CHANNEL_PAGE=2)
        for channel, count in (("b", 1), ("a", 3), ("A%", 1), ("d", 2)):
            for _ in range(count):
                self.broker.post(channel, b"x", priority=count - 1)
            self.clock.now += 1
        self.broker.subscribe("c", "t")
        future = self.park("e")

        def listed(**options):
            """All of it, in pages of two."""
            names = []
            while page := self.broker.list_channels(2, names[-1] if names else "", **options):
                names += page
            return "".join(names)

        self.assertEqual(listed(), "A%abcde")
        self.assertEqual(listed(order="ready"), "adA%bce")
        self.assertEqual(listed(order="oldest"), "baA%dce")
        self.assertEqual(listed(order="oldest", like="a"), "aA%")
        self.assertEqual(listed(like="%"), "A%")
        self.assertEqual(listed(is_visible=lambda name: name > "c"), "de")
        self.assertEqual(self.broker.list_channels(order="ready"), ["a", "d", "A%", "b", "c", "e"])
        with self.assertRaisesRegex(linger.BadRequest, "name, ready, oldest"):
            self.broker.list_channels(order="size")
        self.broker.cancel_all()
        future.result(PATIENCE)

    def test_health_checks_write_at_most_once_a_second(self):
        writes = []
        run = self.broker._committer.run
        spy = lambda operation: (writes.extend(operation.statements), run(operation))  # noqa: E731
        with unittest.mock.patch.object(self.broker._committer, "run", spy):
            for _ in range(5):
                self.broker.check_health()
            self.clock.now += 1
            self.broker.check_health()
        self.assertEqual(len(writes), 2)

    def test_a_database_that_fails_is_healthy_for_a_second_at_most(self):
        self.broker.check_health()
        self.clock.now += 1
        failing = unittest.mock.Mock(side_effect=linger.Unavailable("no disk"))
        with unittest.mock.patch.object(self.broker._committer, "run", failing):
            for _ in range(3):
                with self.assertRaisesRegex(linger.Unavailable, "no disk"):
                    self.broker.check_health()
        failing.assert_called_once()
        self.clock.now += 1
        self.broker.check_health()


class HolderTest(BrokerTest):
    """A look at a message in flight says who has it, and for how long."""

    def take(self, holder, channel="q", **options):
        return self.broker.take(self.broker.consumer([channel], holder=holder, **options))

    def seen(self, id=1):
        message, state = self.broker.read_message(id)
        self.assertEqual(self.broker.list_messages("q"), [(message, state)])
        return state, message.hidden_for, message.holder

    def test_a_dead_letter_in_flight_shows_its_holder(self):
        self.broker.post("q", b"x", dead="d")
        self.broker.reject(1)
        self.take("me", "d", timeout=60)
        self.assertEqual(self.broker.dead_letters(), self.broker.list_messages("d"))
        self.assertEqual(self.broker.dead_letters()[0][0].holder, "me")

    def test_a_message_in_flight_shows_its_holder_and_its_time(self):
        self.broker.post("q", b"x")
        self.assertEqual(self.seen(), ("ready", 0, ""))
        self.take("me", timeout=60)
        self.clock.now += 20.5
        self.assertEqual(self.seen(), ("hidden", 40, "me"))
        self.broker.touch(1)
        self.assertEqual(self.seen(), ("hidden", 30, "me"))
        self.clock.now += 31
        self.assertEqual(self.seen(), ("ready", 0, ""))

    def test_who_had_it_before_is_no_holder(self):
        self.broker.post("q", b"x")
        self.take("one")
        self.broker.release(1, delay=5)
        self.assertEqual(self.seen(), ("delayed", 0, ""))
        self.clock.now += 6
        self.take("two")
        self.assertEqual(self.seen()[2], "two")

    def test_the_holder_of_another_server_on_the_cluster_is_not_known(self):
        self.broker.post("q", b"x")
        (message,) = self.take("me")
        flight = linger.Flight("q", self.clock.now, self.clock.now, message.lease - 1, "who")
        self.broker._state.flights.latest()[1] = flight
        self.assertEqual(self.seen()[2], "")


class BoundsTest(BrokerTest):
    """What a client can make grow."""

    def test_one_channel_too_many_is_refused_whatever_would_make_it(self):
        broker = self.restart(max_channels=4)
        broker.post("a", b"x")
        broker.subscribe("b", "t")
        broker.set_settings("c", timeout=1)
        broker.pause("d")
        for make in (
            lambda: broker.post("e", b"x"),
            lambda: broker.post_batch("e", [(b"x", "x/y", {})]),
            lambda: broker.subscribe("e", "t"),
            lambda: broker.patterns.subscribe("e", "#"),
            lambda: broker.retention.subscribe("e", "t", "all"),
            lambda: broker.set_settings("e", timeout=1),
            lambda: broker.pause("e"),
            lambda: broker.redrive("a", to="e"),
        ):
            with self.assertRaisesRegex(linger.Full, "there are 4 channels"):
                make()
        for channel in "abcd":
            broker.post(channel, b"x")
        self.assertEqual(sorted(broker.publish("t", b"x")[0]), ["b"])

    def test_when_a_channel_is_empty_there_is_room_for_another(self):
        broker = self.restart(max_channels=1)
        broker.delete(broker.post("a", b"x").id)
        with self.assertRaises(linger.Full):
            broker.post("b", b"x")  # counted a moment ago
        self.clock.now += linger.RECOUNT_INTERVAL
        broker.post("b", b"x")
        self.clock.now += linger.RECOUNT_INTERVAL
        with self.assertRaises(linger.Full):
            broker.post("a", b"x")

    def test_channels_are_counted_after_a_restart(self):
        self.broker.post("a", b"x")
        broker = self.restart(max_channels=1)
        with self.assertRaises(linger.Full):
            broker.post("b", b"x")
        broker.post("a", b"x")

    def test_a_dead_letter_is_moved_also_to_a_channel_too_many(self):
        broker = self.restart(max_channels=1)
        broker.reject(broker.post("a", b"x", dead="b").id)
        self.assertEqual(broker.get("b").dead_from, "a")

    def test_consumers_wait_at_a_bounded_number_of_channels(self):
        broker = self.restart(max_channels=2)
        for channel in "abb":
            self.park(channel)
        self.addCleanup(broker.cancel_all)
        with self.assertRaisesRegex(linger.Unavailable, "consumers wait at 2 channels"):
            broker.take(broker.consumer(["a", "c"]), 1)
        self.assertIsNone(broker.get("c"))

    def test_of_consumers_that_begin_to_wait_at_once_only_those_for_which_there_is_room_do(self):
        broker = self.restart(max_channels=2)
        self.addCleanup(broker.cancel_all)
        outcomes = [queue.SimpleQueue() for _ in range(5)]
        broker.post("q", b"x")
        with busy(broker._committer):
            for outcome, channels in zip(outcomes, ("a", "b", "c", "ab", "bd")):
                ack = {"ack": 1} if channels == "bd" else {}
                consumer = broker.consumer([*channels])
                broker.take_async(outcome.put, consumer, PATIENCE, **ack)
        self.assertEqual(broker._read(), [])  # what was submitted is done
        with self.assertRaisesRegex(linger.Unavailable, "consumers wait at 2 channels"):
            outcomes[2].get_nowait().result()
        self.assertEqual(outcomes[4].get_nowait().result(), [])  # message 1 is deleted
        self.assertTrue(all(outcome.empty() for outcome in outcomes))
        self.assertEqual((count_waiting(broker, "a"), count_waiting(broker, "b")), (2, 2))

    def test_the_channels_remembered_after_their_last_consumer_are_bounded(self):
        broker = self.broker
        with unittest.mock.patch.object(linger, "MAX_IDLE_CHANNELS", 3):
            for n in range(5):
                consumer = broker.consumer([f"q{n}"])
                broker.take_async(lambda _: None, consumer, wait=PATIENCE)
                until(lambda n=n: count_waiting(broker, f"q{n}"))
                broker.cancel(consumer)
            self.assertEqual(broker.channels(), ["q2", "q3", "q4"])
        self.assertEqual(broker.counters["channel-remove"], 2)

    def test_the_subscriptions_of_a_topic_are_bounded(self):
        broker = self.broker
        with unittest.mock.patch.object(linger, "MAX_SUBSCRIBERS", 2):
            for channel in "aba":
                broker.subscribe(channel, "t")
            with self.assertRaisesRegex(linger.Full, "2 subscriptions"):
                broker.subscribe("c", "t")
            broker.subscribe("c", "other")
        self.assertEqual(broker.subscribers("t"), ["a", "b"])
        self.assertEqual(broker.counters["subscription-add"], 4)

    def test_the_copies_of_a_batch_are_bounded_in_number_and_bytes(self):
        broker = self.broker
        for channel in "abc":
            broker.subscribe(channel, "t")
        for name, most in (("MAX_BATCH_COPIES", 6), ("MAX_BATCH_COPY_BYTES", 60)):
            with unittest.mock.patch.object(linger, name, most):
                broker.publish_batch("t", [(b"x" * 10, "x/y", {})] * 2)
                with self.assertRaisesRegex(linger.TooLarge, "copied to 3 channels"):
                    broker.publish_batch("t", [(b"x" * 10, "x/y", {})] * 3)
        self.assertEqual(broker.channel_stats("a")["ready"], 4)

    def test_a_database_at_its_bound_adds_nothing_but_gives_and_deletes(self):
        for path in (self.dbfile, linger.MEMORY):
            with self.subTest(path):
                broker = self.restart(path=path, max_size=1_000_000)
                ids = []
                with self.assertRaisesRegex(linger.Full, "near its limit of 1000000 bytes"):
                    while len(ids) < 100:
                        ids.append(broker.post("q", b"x" * 10_000).id)
                self.assertGreater(len(ids), 60)
                for refused in (
                    lambda b=broker: b.subscribe("q", "t"),
                    lambda b=broker: b.post_batch("q", [(b"x", "x/y", {})]),
                ):
                    self.assertRaises(linger.Full, refused)
                for id in ids:
                    self.assertEqual(broker.get("q").id, id)
                    broker.delete(id)
                for _ in ids:
                    broker.post("q", b"x" * 10_000)

    def test_no_transaction_takes_a_database_beyond_its_bound(self):
        broker = self.restart(max_size=1_000_000)
        for n in range(30):
            broker.subscribe(f"c{n}", "t")
        with self.assertRaisesRegex(linger.Full, "nothing was changed"):
            broker.publish("t", b"x" * 100_000)
        self.assertEqual(broker.stats()["current-messages"], 0)
        broker.post("q", b"x")

    def test_a_reply_counts_in_the_bound(self):
        broker = self.restart(max_size=1_000_000)
        call = self.thread(broker.calls.call, "q", b"x")
        id = broker.get("q", PATIENCE).id
        with self.assertRaisesRegex(linger.Full, "nothing was changed"):
            broker.calls.reply(id, b"x" * 2_000_000)
        broker.calls.reply(id, b"5")
        self.assertEqual(call.result(PATIENCE)[0], b"5")

    def test_publications_that_are_kept_count_in_the_bound(self):
        broker = self.restart(max_size=1_000_000)
        broker.retention.put("t", keep=1_000)
        with self.assertRaisesRegex(linger.Full, "near its limit of 1000000 bytes"):
            for _ in range(100):
                broker.publish("t", b"x" * 10_000)
        broker.retention.put("t", keep=50)
        broker.publish("t", b"x" * 10_000)

    def test_a_database_that_is_larger_than_its_bound_still_gives_and_deletes(self):
        ids = [self.broker.post("q", b"x" * 10_000).id for _ in range(100)]
        broker = self.restart(max_size=500_000)
        self.assertRaises(linger.Full, broker.post, "q", b"x")
        for id in ids:
            self.assertEqual(broker.get("q").id, id)
            broker.delete(id)
        broker.post("q", b"x")


class PatternTreeTest(unittest.TestCase):
    """Which topics match a pattern."""

    def test_words_and_wildcards(self):
        for pattern, matching, others in (
            ("a.*.c", "a.b.c a..c a.*.c a.#.c", "a.c a.b.b.c a.b.c. .a.b.c A.b.c"),
            ("a.#", "a a.b a.b.c a. a..", "ab b.a .a"),
            ("#.z", "z a.z a.b.z .z", "z. az z.a"),
            ("#", "a a.b . .. * # ¡olé!", ""),
            ("*", "a * # ä", "a.b . a."),
            ("*.*", "a.b . a. .b", "a a.b.c .."),
            ("#.#", "a a.b", ""),
            ("#.a.#", "a x.a a.x x.a.y a.a", "x ab x.y"),
            ("*.#", "a a.b . ..", ""),
            ("#.*", "a a.b . ..", ""),
            ("a.#.b.#.c", "a.b.c a.x.b.c a.b.x.c a.x.b.y.c a.b.b.c", "a.c a.x.c a.b a.b.cc"),
            ("a..b", "a..b", "a.b a...b a.x.b"),
            ("grün.*.你好", "grün.a.你好", "grun.a.你好 grün.你好"),
            ("a*.b#", "a*.b#", "ax.by a.b"),  # a wildcard is a whole word
            ("a.b", "a.b", "a a.b.c"),
        ):
            tree = linger.PatternTree()
            tree.add(pattern, "q")
            found = [t for t in f"{matching} {others}".split() if tree.match(t) == [pattern]]
            self.assertEqual(found, matching.split(), pattern)

    def test_it_finds_what_a_regular_expression_finds(self):
        chance = random.Random(7)
        words = ("a", "b", "", "*", "#")
        patterns = {".".join(chance.choices(words, k=chance.randint(1, 5))) for _ in range(300)}
        patterns.discard("")
        tree = linger.PatternTree()
        tree.learn((pattern, "q") for pattern in patterns)

        def matches(pattern, words):
            if not pattern:
                return not words
            if pattern[0] == "#":
                return any(matches(pattern[1:], words[n:]) for n in range(len(words) + 1))
            return bool(words) and pattern[0] in ("*", words[0]) and matches(pattern[1:], words[1:])

        for _ in range(100):
            topic = ".".join(chance.choices(words, k=chance.randint(1, 6)))
            expected = sorted(p for p in patterns if matches(p.split("."), topic.split(".")))
            self.assertEqual(tree.match(topic), expected, topic)

    def test_a_match_looks_at_each_word_of_the_patterns_once_at_most(self):
        topic = "a." * 60 + "a"
        for part in (".#", ".#.a", ".#.*", ".a"):
            tree, patterns = linger.PatternTree(), [f"{start}.#{part * 40}.b" for start in "*#a"]
            tree.learn((pattern, "q") for pattern in patterns)
            words = topic.split(".") + ".".join(patterns).split(".")
            # `is_interrupted`: after so many opcodes the match still runs
            call = functools.partial(tree.match, topic)
            self.assertFalse(is_interrupted(call, 100 * len(words)), part)

    def test_a_pattern_stays_until_its_last_owner_has_gone(self):
        tree = linger.PatternTree()
        tree.learn([("old.#", "q")])
        tree.learn([])
        for pattern, owner in (("a.#", "p"), ("a.#", "q"), ("a.b", "q")):
            tree.add(pattern, owner)
        tree.discard("a.#", "p")
        self.assertEqual(tree.match("a.b"), ["a.#", "a.b"])
        tree.discard("a.#", "q")
        tree.discard("a.#", "q")
        tree.discard("x", "q")
        self.assertEqual((tree.match("a.b"), tree.match("a")), (["a.b"], []))
        tree.discard("a.b", "q")
        self.assertEqual((bool(tree), tree._root), (False, {}))


class PatternTest(BrokerTest):
    """Subscriptions to patterns."""

    def published(self, topic, body=b"x"):
        """The channels that get a copy."""
        return sorted(self.broker.publish(topic, body)[0])

    def test_all_channels_with_a_matching_pattern_get_a_copy(self):
        self.broker.patterns.subscribe("all", "#")
        self.broker.patterns.subscribe("eu", "orders.eu.#", priority=3, timeout=7)
        self.broker.patterns.subscribe("us", "orders.us.#")
        self.broker.subscribe("direct", "orders.eu.paid")
        self.assertEqual(self.published("orders.eu.paid"), ["all", "direct", "eu"])
        message = self.broker.get("eu")
        self.assertEqual((message.topic, message.priority, message.timeout),
                         ("orders.eu.paid", 3, 7))  # fmt: skip
        self.assertEqual(self.broker.patterns.names(), ["#", "orders.eu.#", "orders.us.#"])
        self.assertEqual(self.broker.patterns.names("eu"), ["orders.eu.#"])
        self.assertEqual(self.broker.topics(), ["orders.eu.paid"])

    def test_a_channel_gets_one_copy_with_the_parameters_of_its_first_subscription(self):
        for pattern, priority in (("a.*", 1), ("a.#", 2), ("#", 3), ("*.b", 4)):
            self.broker.patterns.subscribe("q", pattern, priority=priority)
        self.broker.subscribe("q", "a.b", priority=9)
        self.assertEqual(self.published("a.b"), ["q"])
        self.assertEqual(self.broker.get("q", auto=True).priority, 9)
        self.broker.unsubscribe("q", "a.b")
        for pattern, priority in (("#", 3), ("*.b", 4), ("a.#", 2), ("a.*", 1)):
            self.assertEqual(self.published("a.b"), ["q"])
            self.assertEqual(self.broker.get("q", auto=True).priority, priority)
            self.broker.patterns.unsubscribe("q", pattern)
        self.assertEqual(self.published("a.b"), [])

    def test_each_channel_of_a_pattern_ends_its_own_subscription(self):
        for channel in "pq":
            self.broker.patterns.subscribe(channel, "a.#")
        self.assertEqual(self.broker.patterns.names(), ["a.#"])
        self.broker.patterns.unsubscribe("p", "a.#")
        self.assertEqual(self.published("a"), ["q"])
        self.broker.patterns.unsubscribe("q", "a.#")
        self.assertFalse(self.broker._state.patterns)

    def test_a_topic_may_hold_the_wildcards_as_characters(self):
        self.broker.subscribe("direct", "a.*")
        self.broker.patterns.subscribe("pattern", "a.*")
        self.assertEqual(self.published("a.*"), ["direct", "pattern"])
        self.assertEqual(self.published("a.b"), ["pattern"])

    def test_an_ended_subscription_gets_nothing_also_from_what_is_published_meanwhile(self):
        self.broker.patterns.subscribe("q", "#")
        publish = linger.Publish(
            self.broker._state, [self.broker._new.published("t", b"x", "", {})]
        )
        self.broker.patterns.unsubscribe("q", "#")
        self.broker.patterns.unsubscribe("q", "#")
        self.assertEqual(self.broker._committer.run(publish)[0].ids, {})
        self.assertEqual((self.published("t"), self.broker.channels()), ([], []))
        self.assertEqual(self.broker.counters["subscription-delete"], 1)

    def test_settings_marks_keys_and_headers_hold_for_copies(self):
        self.broker.patterns.subscribe("q", "#", delay=0)
        self.broker.patterns.subscribe("p", "#")
        self.broker.set_settings("q", hlm=1, delay=9, dead="d")
        ids, full, duplicate = self.broker.publish("t", b"1", dedup="k", headers={"A": "1"})
        self.assertEqual((sorted(ids), full, duplicate), (["p", "q"], [], False))
        self.assertEqual(self.broker.publish("t", b"1", dedup="k"), (ids, [], True))
        self.assertEqual(self.broker.publish("t", b"2")[1], ["q"])
        self.assertEqual(self.broker.get("q").headers, {"a": "1"})
        self.assertEqual(self.broker.publish_batch("t", [(b"3", "", {})] * 2)[1], ["q"])

    def test_a_waiting_consumer_gets_its_copy(self):
        self.broker.patterns.subscribe("q", "a.#")
        waiting = self.park("q")
        self.published("a.b")
        self.assertEqual(waiting.result(PATIENCE).body, b"x")

    def test_they_are_kept_over_a_restart_and_make_their_channels_known(self):
        self.broker.patterns.subscribe("q", "a.*")
        self.broker.subscribe("b", "t")
        self.restart()
        self.assertEqual(self.published("a.b"), ["q"])
        self.broker.drain("q")
        self.assertEqual(self.broker.channels(), ["b", "q"])
        self.assertEqual(self.broker.list_channels(n=1, after="b"), ["q"])

    def test_bad_names_and_parameters_are_refused(self):
        for pattern, options in (
            ("", {}), ("\n", {}), ("x" * 256, {}), ("a", {"timeout": 0}), ("a", {"unique": "k"}),
            ("a", {"delay": 2, "linger": 1}),
        ):  # fmt: skip
            with self.subTest(pattern), self.assertRaises(linger.BadRequest):
                self.broker.patterns.subscribe("q", pattern, **options)
        self.assertEqual(self.broker.patterns.names(), [])

    def test_their_number_is_limited(self):
        self.hasten(MAX_TOPIC_PATTERNS=2)
        for pattern in ("a", "b", "a"):
            self.broker.patterns.subscribe("q", pattern)
        with self.assertRaisesRegex(linger.Full, "2 subscriptions"):
            self.broker.patterns.subscribe("q", "c")
        self.assertEqual((self.published("c"), self.broker._state.patterns.match("c")), ([], []))

    def test_a_batch_that_would_become_too_many_copies_is_refused(self):
        self.hasten(MAX_BATCH_COPIES=3)
        for channel in "pq":
            self.broker.patterns.subscribe(channel, "#")
        with self.assertRaises(linger.TooLarge):
            self.broker.publish_batch("t", [(b"x", "", {})] * 2)

    def test_a_subscription_that_ends_before_the_commit_gets_no_copy(self):
        for channel in ("p", "q"):
            self.broker.patterns.subscribe(channel, "a.#")
        message = self.broker._new.published("a.b", b"x", "", {})
        publish = linger.Publish(self.broker._state, [message])
        self.broker.patterns.unsubscribe("p", "a.#")
        self.broker.patterns.subscribe("r", "#")  # which is seen by the next publication
        (publication,) = self.broker._committer.run(publish)
        self.assertEqual(sorted(publication.ids), ["q"])

    def test_a_publish_without_patterns_runs_the_usual_statements(self):
        publish = linger.Publish(
            self.broker._state, [self.broker._new.published("t", b"x", "", {})]
        )
        usual = [linger.FULL_SUBSCRIBERS, linger.PUBLISH_MESSAGE, linger.PUBLISHED]
        self.assertEqual(publish.statements, usual)

    def test_readers_of_a_pattern_see_what_is_published_on_its_topics(self):
        memory = linger.MemoryBudget(10**7)
        listener = unittest.mock.Mock(**{"is_disconnected.return_value": False})
        readers = [self.broker.listen("patterns", p, listener, memory) for p in ("a.#", "#.b", "c")]
        for topic in ("a.b", "x", "a"):
            self.published(topic)
        seen = [[event.message.topic for event in reader.events()] for reader in readers[:2]]
        self.assertEqual(seen, [["a.b", "a"], ["a.b"]])
        for reader in readers:
            reader.close()
        self.assertFalse(self.broker._state.live.patterns or self.broker._state.live.pattern_tree)

    def test_readers_look_again_only_for_topics_that_concern_them(self):
        listener, memory = unittest.mock.Mock(), linger.MemoryBudget(10**7)
        names = [("topics", "a"), ("topics", "b"), ("patterns", "a.#"), ("patterns", "b.#")]
        readers = [self.broker.listen(kind, name, listener, memory) for kind, name in names]
        self.broker._state.live.look_again({"a", "c"})
        self.assertEqual([reader.is_silent for reader in readers], [True, False, True, False])

    def test_readers_come_and_go_without_a_look_at_the_other_patterns(self):
        live = self.broker._state.live
        listener = unittest.mock.Mock(**{"is_disconnected.return_value": False})

        def listen(pattern):
            return self.broker.listen("patterns", pattern, listener, linger.MemoryBudget(10**7))

        readers = [listen(pattern) for pattern in ("a.#", "b.#", "b.#")]
        with unittest.mock.patch.object(linger.PatternTree, "learn", side_effect=AssertionError):
            for reader in readers[:2]:
                reader.close()
                reader.close()
        self.assertEqual(live.pattern_tree.match("b.c"), ["b.#"])
        live.patterns["b.#"].remove(readers[2])  # as one that was too slow, which closes later
        again = listen("b.#")
        readers[2].close()
        self.assertEqual(live.pattern_tree.match("b.c"), ["b.#"])
        again.close()
        self.assertEqual(live.pattern_tree.match("b.c"), [])


class RetentionTest(BrokerTest):
    """Publications that are kept for later readers."""

    def publish(self, *bodies, topic="t", **keys):
        """The ids of the publications."""
        return [self.broker.publication(topic, body, **keys).id for body in bodies]

    def kept(self, since="all", topic="t", **options):
        return [m.body for m in self.broker.retention.kept(topic, since, **options)]

    def count(self):
        """The rows that there are."""
        return self.broker._store.read("select count(*) from publications")[0][0][0]

    def test_the_last_ones_are_kept_and_have_ids(self):
        self.assertEqual(self.publish(b"before"), [0])
        self.broker.retention.put("t", keep=2)
        self.publish(b"other", topic="u")
        self.assertEqual(self.publish(b"1", b"2", b"3", headers={"A": "1"}), [1, 2, 3])
        (second, third) = self.broker.retention.kept("t")
        self.assertEqual((second.id, second.body, second.topic, second.headers),
                         (2, b"2", "t", {"a": "1"}))  # fmt: skip
        self.assertEqual((third.id, self.kept("2"), self.kept("3")), (3, [b"3"], []))
        self.assertEqual((self.kept(n=1), self.count()), ([b"2"], 2))

    def test_both_limits_hold_at_once(self):
        self.hasten(TRIM_INTERVAL=0.0)
        self.broker.retention.put("t", keep=2, keep_for=10)
        self.publish(b"1", b"2", b"3")
        self.clock.now += 9
        self.publish(b"4")
        self.assertEqual(self.kept(), [b"3", b"4"])
        self.clock.now += 1
        self.assertEqual(self.kept(), [b"4"])
        self.broker.retention.trim_due(PATIENCE)
        self.assertEqual(self.count(), 1)
        self.assertEqual(self.broker.retention.settings("t"), {"keep": 2, "keep-for": 10})

    def test_settings_are_set_although_the_database_fails_while_it_trims(self):
        self.hasten(TRIM_INTERVAL=0.0)
        self.broker.retention.put("t", keep=9)
        self.publish(b"1", b"2")
        with unittest.mock.patch.object(self.broker.retention, "_trim") as trim:
            trim.side_effect = linger.Unavailable(f"no disk{linger.NOTHING_CHANGED}")
            self.broker.retention.put("t", keep=1)
            self.assertEqual(self.kept(), [b"2"])
            self.broker.retention.clear("t")
            self.assertEqual(self.kept(), [])
        self.broker.retention.trim_due(PATIENCE)
        self.assertEqual(self.count(), 0)

    def test_only_topics_with_something_to_delete_are_trimmed(self):
        for topic, settings in (("a", {"keep": 9}), ("b", {"keep_for": 90}), ("c", {"keep": 1})):
            self.broker.retention.put(topic, **settings)
            self.publish(b"1", b"2", topic=topic)
        self.hasten(TRIM_INTERVAL=0.0)
        with unittest.mock.patch.object(self.broker.retention, "_trim") as trim:
            self.broker.retention.trim_due(PATIENCE)
            trim.assert_not_called()
            self.clock.now += 90
            self.broker.retention._set(linger.CLEAR_RETENTION, "a", 0, None)  # and is killed
            self.broker.retention._set(linger.SET_RETENTION, "c", 2, None)
            self.publish(b"3", topic="c")
            self.broker.retention._set(linger.SET_RETENTION, "c", 1, None)
            trim.reset_mock()
            self.broker.retention.trim_due(PATIENCE)
            self.assertEqual({call.args[0] for call in trim.mock_calls}, {"a", "b", "c"})
        self.broker.retention.trim_due(PATIENCE)
        self.assertEqual(self.count(), 1)

    def test_since_is_an_id_an_age_or_all(self):
        self.broker.retention.put("t", keep_for=10**6)
        for body in (b"1", b"2", b"3"):
            self.publish(body)
            self.clock.now += 60
        for since, bodies in (("all", [b"1", b"2", b"3"]), ("0", [b"1", b"2", b"3"]),
                              ("2", [b"3"]), ("99", []), ("150s", [b"2", b"3"]), ("2m", [b"3"]),
                              ("1h", [b"1", b"2", b"3"]), ("0d", [])):  # fmt: skip
            self.assertEqual(self.kept(since), bodies, since)
        for since in ("", "x", "-1", "1w", "5 m", "all "):
            self.assertRaises(linger.BadRequest, self.kept, since)

    def test_those_of_an_age_are_found_without_reading_the_older_ones(self):
        self.hasten(COMMIT_TIME=2.0)
        self.broker.retention.put("t", keep_for=10**6)
        for n in range(200):
            self.publish(b"%d" % n, topic="t" if n % 3 else "u")
            self.clock.now += 1
        for age in (0, 1, 2, 7, 50, 198, 200, 1_000):
            values = self.broker.retention._since(f"{age}s")
            bodies = [b"%d" % n for n in range(max(201 - age, 0), 200) if n % 3]
            kept = self.broker.retention.kept("t", f"{age}s", 999)
            self.assertEqual([publication.body for publication in kept], bodies, age)
            first = kept[0].id if kept else 134
            self.assertLess(values["after"], first)
            self.assertLess(first - values["after"], 6, age)
        self.broker.retention.clear("t")
        self.assertEqual(self.kept("5m"), [])

    def test_fewer_are_kept_at_once_when_the_settings_say_so(self):
        self.broker.retention.put("t", keep=9)
        self.publish(*(b"%d" % n for n in range(9)))
        self.broker.retention.put("t", keep=1)
        self.assertEqual((self.kept(), self.count()), ([b"8"], 1))
        self.publish(b"9")
        self.assertEqual((self.kept(), self.count()), ([b"9"], 1))

    def test_nothing_is_kept_after_it_was_cleared(self):
        self.hasten(PIECE_ROWS=2, FIRST_PIECE=1)
        self.broker.retention.put("t", keep=9)
        self.publish(b"1", b"2", b"3")
        self.broker.retention.clear("t")
        self.broker.retention.clear("t")
        self.assertEqual((self.publish(b"4"), self.kept(), self.count()), ([0], [], 0))
        self.assertEqual(self.broker.retention.settings("t"), {})
        self.assertEqual(self.broker._store.read(linger.ALL_RETENTION), [[]])

    def test_what_takes_long_to_delete_goes_in_smaller_pieces(self):
        self.hasten(PIECE_TIME=0.0, FIRST_PIECE=4)
        self.broker.retention.put("t", keep=9)
        self.publish(*(b"%d" % n for n in range(9)))
        with unittest.mock.patch.object(linger, "Change", wraps=linger.Change) as change:
            self.broker.retention.clear("t")
        sizes = [call.args[1]["trim"] for call in change.mock_calls if "trim" in call.args[1]]
        self.assertEqual(sizes, [4, 2, 1, 1, 1, 1])
        self.assertEqual((self.count(), self.broker._store.read(linger.ALL_RETENTION)), (0, [[]]))

    def test_the_ticker_deletes_for_a_short_time_and_goes_on_later(self):
        self.broker.retention.put("t", keep_for=10)
        self.publish(b"1", b"2")
        self.clock.now += 10 + linger.TRIM_INTERVAL
        self.broker.retention.trim_due(0.0)
        self.broker.retention.trim_due(PATIENCE)
        self.assertEqual(self.count(), 0)

    def test_ids_go_on_after_a_restart(self):
        self.broker.retention.put("t", keep=1)
        self.publish(b"1", b"2")
        self.restart()
        self.assertEqual((self.publish(b"3"), self.kept()), ([3], [b"3"]))

    def test_a_duplicate_is_not_kept_again(self):
        self.broker.retention.put("t", keep=9)
        self.assertEqual(self.publish(b"1", b"2"), [1, 2])
        self.assertEqual(self.publish(b"3", b"3", dedup="k"), [3, 3])
        self.broker.subscribe("q", "t")
        self.assertEqual(self.publish(b"4", b"5", b"4", dedup="l"), [4, 4, 4])
        self.broker.retention.clear("t")
        self.assertEqual(self.publish(b"6", b"6", dedup="m"), [0, 0])
        self.assertEqual(self.bodies("q"), [b"4", b"6"])

    def test_the_ids_of_a_batch_follow_each_other_and_duplicates_have_none(self):
        self.broker.retention.put("t", keep=2)
        self.publish(b"1", topic="t", dedup="k")
        batch = [(b"2", "", {}), (b"1", "", {"dedup": "k"}), (b"3", "", {}), (b"4", "", {})]
        ids = self.broker.publish_batch("t", batch)[2]
        self.assertEqual((ids, self.kept(), self.kept(str(ids[1]))), (
            range(2, 5), [b"3", b"4"], [b"4"]))  # fmt: skip
        self.assertEqual(self.broker.publish_batch("t", batch[1:2])[2], range(1, 2))
        self.publish(b"5")
        items = [(b"x", "", {"dedup": linger.BatchKey("b", n)}) for n in range(3)]
        for _ in range(2):
            self.assertEqual(self.broker.publish_batch("t", items)[2], range(6, 9))
        others = [(b"x", "", {"dedup": key}) for key in ("k", "l")]
        self.assertEqual(self.broker.publish_batch("t", others)[2], range(9, 10))
        self.assertEqual(self.broker.publish_batch("t", others)[2], range(0))

    def test_subscribers_patterns_and_batches_go_on_as_before(self):
        self.broker.retention.put("t", keep=9)
        self.broker.subscribe("q", "t")
        self.broker.patterns.subscribe("p", "#")
        ids, _, _ = self.broker.publish("t", b"1", dedup="k")
        self.assertEqual(sorted(ids), ["p", "q"])
        self.assertEqual(self.broker.publish("t", b"1", dedup="k"), (ids, [], True))
        self.broker.publish_batch("t", [(b"2", "", {}), (b"3", "", {})])
        self.assertEqual(self.kept(), [b"1", b"2", b"3"])
        self.assertEqual(self.bodies("q"), [b"1", b"2", b"3"])

    def test_what_is_published_as_a_reader_begins_to_listen_is_read_once(self):
        def listen():
            self.publish(b"2")  # after the last one was read
            listener = unittest.mock.Mock(**{"is_disconnected.return_value": False})
            reader = self.broker.listen("topics", "t", listener, linger.MemoryBudget(10**7))
            self.publish(b"3")  # which is kept, and an event
            return reader

        def kept(since, n):
            publications = self.broker.retention.kept("t", since, n)
            if not publications:
                self.publish(b"4")  # after all that was kept has been read
            return publications

        self.broker.retention.put("t", keep=9)
        self.publish(b"1")
        replay = linger.Replay(listen, kept, "all")
        read = [[e.message.body for e in replay.events()] for _ in range(3)]
        replay.close()
        self.assertEqual(read, [[b"1"], [b"2", b"3"], [b"4"]])

    def test_a_replay_of_a_pattern_has_what_each_topic_keeps_in_order(self):
        chance, keep = random.Random(3), {f"a.{n}": n for n in range(1, 7)}
        for topic, number in {**keep, "b": 9}.items():
            self.broker.retention.put(topic, keep=number)
        self.broker.retention.put("a.old", keep_for=5)
        self.publish(b"too old", topic="a.old")
        self.clock.now += 5
        topics = chance.choices([*keep, "b", "a.none"], k=99)
        ids = [(topic, *self.publish(b"x", topic=topic)) for topic in topics]
        kept = [[id for t, id in ids if t == topic][-number:] for topic, number in keep.items()]
        kept = sorted(itertools.chain(*kept))
        self.hasten(REPLAY_PAGE=4)
        for since, expected in (("all", kept), ("1h", kept), (str(kept[5]), kept[6:])):
            replay = self.broker.retention.replay("patterns", "a.*", since, self.fail)
            read = []
            while len(read) < len(expected) - 3:  # before the last page, so it does not listen
                read += [event.message.id for event in replay.events()]
            self.assertEqual(read, expected[: len(read)])

    def test_a_replay_gives_a_slow_reader_few_bytes_at_once(self):
        self.broker.retention.put("t", keep=9)
        ids = self.publish(b"1", *[b"x" * 60_000] * 3, b"2")
        replay = self.broker.retention.replay("topics", "t", "all", self.fail)
        read = [[event.message.id for event in replay.events()] for _ in range(2)]
        self.assertEqual(read, [ids[:2], ids[2:3]])

    def test_a_channel_can_get_what_was_kept_when_it_subscribes(self):
        self.broker.retention.put("t", keep=3)
        self.publish(b"0", b"1", b"2", b"3", headers={"A": "1"})
        waiting = self.park("q")
        self.broker.retention.subscribe("q", "t", "all", priority=4)
        self.publish(b"4")
        message = waiting.result(PATIENCE)
        self.assertEqual((message.body, message.priority, message.headers, message.topic),
                         (b"1", 4, {"a": "1"}, "t"))  # fmt: skip
        self.assertEqual(self.bodies("q"), [b"2", b"3", b"4"])
        self.broker.retention.subscribe("p", "t", "3")
        self.assertEqual(self.bodies("p"), [b"3", b"4"])

    def test_copies_of_a_group_come_in_order_one_at_a_time(self):
        self.broker.retention.put("t", keep=9)
        self.publish(b"1", b"2", group="g")
        self.publish(b"other")
        self.publish(b"3", group="h")
        self.publish(b"4", group="i")
        self.broker.post("q", b"first", group="h")
        self.broker.retention.subscribe("q", "t", "all")
        self.assertEqual(self.bodies("q"), [b"first", b"1", b"other", b"4"])
        for id in (1, 2):
            self.broker.delete(id)
        self.assertEqual(self.bodies("q"), [b"2", b"3"])

    def test_copies_that_do_not_fit_are_refused_and_nothing_changes(self):
        self.broker.retention.put("t", keep=9)
        self.publish(b"1", b"2")
        self.broker.set_settings("q", hlm=1)
        with self.assertRaisesRegex(linger.Full, "mark of 1"):
            self.broker.retention.subscribe("q", "t", "all")
        self.hasten(MAX_BATCH_COPIES=1)
        with self.assertRaises(linger.TooLarge):
            self.broker.retention.subscribe("p", "t", "all")
        self.assertEqual((self.broker.topics(), self.broker.publish("t", b"x")[0]), ([], {}))

    def test_a_post_that_comes_first_leaves_no_room_for_the_copies(self):
        def backfill(*arguments):
            self.broker.post("q", b"first")  # after all that was checked before the transaction
            return operation(*arguments)

        operation = linger.Backfill
        self.broker.retention.put("t", keep=9)
        self.publish(b"1", b"2")
        self.broker.set_settings("q", hlm=2)
        patch = unittest.mock.patch.object(linger, "Backfill", backfill)
        with patch, self.assertRaisesRegex(linger.Full, "mark of 2"):
            self.broker.retention.subscribe("q", "t", "all")
        self.assertEqual((self.broker.topics(), self.bodies("q")), ([], [b"first"]))

    def test_a_repeated_call_copies_nothing_and_is_not_refused(self):
        self.broker.retention.put("t", keep=9)
        self.publish(b"1", b"2")
        self.broker.set_settings("q", hlm=3)
        for priority in (1, 2):
            self.broker.retention.subscribe("q", "t", "all", priority=priority)
        self.publish(b"3")
        messages = [message for message, _ in self.broker.list_messages("q")]
        self.assertEqual([(m.body, m.priority) for m in messages],
                         [(b"1", 1), (b"2", 1), (b"3", 2)])  # fmt: skip
        self.hasten(MAX_BATCH_COPIES=1)
        self.broker.retention.subscribe("q", "t", "all")
        self.assertEqual(len(self.broker.list_messages("q")), 3)
        self.broker.unsubscribe("q", "t")
        self.assertRaises(linger.TooLarge, self.broker.retention.subscribe, "q", "t", "all")

    def test_what_is_wrong_is_refused(self):
        for options in ({}, {"keep": 0}, {"keep": linger.MAX_KEPT + 1}, {"keep_for": 0}):
            with self.subTest(options), self.assertRaises(linger.BadRequest):
                self.broker.retention.put("t", **options)
        self.hasten(MAX_KEEPING_TOPICS=1)
        self.broker.retention.put("t", keep=1)
        self.broker.retention.put("t", keep=2)
        with self.assertRaisesRegex(linger.Full, "1 topics"):
            self.broker.retention.put("u", keep=1)
        self.assertEqual(self.broker.retention.settings("u"), {})


class CronTest(unittest.TestCase):
    """The due times of cron expressions."""

    def times(self, text, start, n, tz="UTC"):
        """The first n due times after a local one, in local time."""
        cron = linger.Cron(text, tz)
        moment = datetime.datetime.fromisoformat(start).replace(tzinfo=cron.zone).timestamp()
        found = []
        for _ in range(n):
            moment = cron.next_after(moment)
            at = datetime.datetime.fromtimestamp(moment, cron.zone)
            found.append(at.strftime("%m-%d %H:%M") + (" again" if at.fold else ""))
        return found

    def test_fields_are_lists_ranges_steps_and_names(self):
        for text, start, due in (
            ("0 3 * * *", "2026-01-01T03:00", "01-02 03:00"),
            ("0 3 * * *", "2026-01-01T02:59:59", "01-01 03:00"),
            ("*/20 * * * *", "2026-01-01T00:20", "01-01 00:40"),
            ("1-9/4,50 * * * *", "2026-01-01T00:05", "01-01 00:09"),
            ("1-9/4,50 * * * *", "2026-01-01T00:09", "01-01 00:50"),
            ("0 0 * feb *", "2026-01-01T00:00", "02-01 00:00"),
            ("0 0 * JAN-Mar mon", "2026-01-01T00:00", "01-05 00:00"),
            ("0 0 1 mar *", "2026-01-01T00:00", "03-01 00:00"),
            ("0 0 * * 7", "2026-01-01T00:00", "01-04 00:00"),
            ("0 0 * * fri-sun", "2026-01-02T00:00", "01-03 00:00"),
            ("0 0 * * 5-7", "2026-01-03T00:00", "01-04 00:00"),
            ("0 0 13 * fri", "2026-01-09T00:00", "01-13 00:00"),  # one of them is enough
            ("0 0 */2 * mon", "2026-01-01T00:00", "01-05 00:00"),  # both, as one begins with *
            ("59 23 31 dec *", "2026-12-31T23:59", "12-31 23:59"),
            ("@hourly", "2026-01-01T00:00", "01-01 01:00"),
            ("@daily", "2026-01-01T00:00", "01-02 00:00"),
            ("@weekly", "2026-01-01T00:00", "01-04 00:00"),
            ("@Monthly", "2026-01-01T00:00", "02-01 00:00"),
            ("@yearly", "2026-01-01T00:01", "01-01 00:00"),
        ):
            with self.subTest(text, start=start):
                self.assertEqual(self.times(text, start, 1), [due])

    def test_days_that_not_every_month_or_year_has(self):
        self.assertEqual(self.times("0 0 31 * *", "2026-02-01T00:00", 2),
                         ["03-31 00:00", "05-31 00:00"])  # fmt: skip
        self.assertEqual(self.times("0 0 15,l * *", "2028-01-31T00:00", 4),
                         ["02-15 00:00", "02-29 00:00", "03-15 00:00", "03-31 00:00"])  # fmt: skip
        leap_day = linger.Cron("0 0 29 2 *")
        moment = leap_day.next_after(datetime.datetime(2096, 3, 1).timestamp())
        self.assertEqual(time.gmtime(moment)[:3], (2104, 2, 29))

    @unittest.skipUnless(os.path.isdir("/usr/share/zoneinfo/Europe"), "needs time zones")
    def test_the_clock_is_set_forward(self):
        for text, start, due in (
            ("30 2 * * *", "2026-03-28T02:30", ["03-29 03:30", "03-30 02:30"]),
            ("30 2,3 * * *", "2026-03-28T03:30", ["03-29 03:30", "03-30 02:30"]),
            ("30 2 29 * *", "2026-03-29T03:10", ["03-29 03:30", "04-29 02:30"]),
            ("7 * * * *", "2026-03-29T01:07", ["03-29 03:07", "03-29 04:07"]),
            ("*/30 * * * *", "2026-03-29T01:30", ["03-29 03:00", "03-29 03:30", "03-29 04:00"]),
        ):
            with self.subTest(text):
                self.assertEqual(self.times(text, start, len(due), "Europe/Berlin"), due)
        self.assertEqual(self.times("15 2 * * *", "2026-10-03T02:15", 1, "Australia/Lord_Howe"),
                         ["10-04 02:45"])  # by half an hour  # fmt: skip
        self.assertEqual(self.times("15,30 2 4 10 *", "2026-09-01T00:00", 2, "Australia/Lord_Howe"),
                         ["10-04 02:30", "10-04 02:45"])  # fmt: skip
        self.assertEqual(self.times("15 2 * * *", "2011-12-29T02:15", 2, "Pacific/Apia"),
                         ["12-31 02:15", "01-01 02:15"])  # by a day  # fmt: skip

    @unittest.skipUnless(os.path.isdir("/usr/share/zoneinfo/Europe"), "needs time zones")
    def test_the_clock_is_set_back(self):
        for text, due in (
            ("30 2 * * *", ["10-25 02:30", "10-26 02:30"]),
            ("*/30 1-3 * * *", ["10-25 02:00", "10-25 02:30", "10-25 03:00", "10-25 03:30"]),
            ("30 * * * *", ["10-25 02:30", "10-25 02:30 again", "10-25 03:30"]),
            ("*/30 * * * *", ["10-25 02:00", "10-25 02:30", "10-25 02:00 again",
                              "10-25 02:30 again", "10-25 03:00"]),
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(self.times(text, "2026-10-25T01:30", len(due), "Europe/Berlin"),
                                 due)  # fmt: skip

    @unittest.skipUnless(os.path.isdir("/usr/share/zoneinfo/Europe"), "needs time zones")
    def test_each_minute_is_due_once_while_the_clock_is_changed(self):
        for day in ("2026-03-29T00:00", "2026-10-25T00:00"):
            cron = linger.Cron("* * * * *", "Europe/Berlin")
            moment = datetime.datetime.fromisoformat(day + "+00:00").timestamp()
            for n in range(1, 120):
                self.assertEqual(cron.next_after(moment + n * 60 - 1), moment + n * 60)

    def test_a_bad_expression_is_refused_with_what_would_be_right(self):
        for text, words in (
            ("", "five fields"), ("* * * *", "five fields"), ("@reboot", "five fields"),
            ("* " * 300, "five fields"), ("60 * * * *", "minute 60"), ("* 24 * * *", "hour 24"),
            ("0 0 0 * *", "day of the month 0"), ("0 0 * 13 *", "month 13"),
            ("0 0 * foo *", "1 to 12 or jan to dec"), ("* * * * 8", "day of the week 8"),
            ("9-1 * * * *", "9-1"), ("*/0 * * * *", r"\*/0"), ("5/15 * * * *", "steps"),
            ("1,,2 * * * *", "minute"), ("-1 * * * *", "-1"), ("l * * * *", "minute l"),
            ("0 0 30 2 *", "never due"), ("0 0 31 4,6 *", "never due"),
        ):  # fmt: skip
            with self.subTest(text), self.assertRaisesRegex(linger.BadRequest, words):
                linger.Cron(text)

    def test_a_zone_that_is_not_known_is_refused(self):
        for name in ("Mars/Base", "", "/etc/passwd", "../x", "Europe", "\0"):
            with self.subTest(name), self.assertRaisesRegex(linger.BadRequest, "time zone"):
                linger.Cron("@daily", name)
        script = (
            "from linger import Cron; Cron('@daily'), print('UTC'), Cron('@daily', 'Asia/Tokyo')"
        )
        python = subprocess.run(
            [sys.executable, "-S", "-c", script], cwd=os.path.dirname(compiled), text=True,
            capture_output=True, env={**os.environ, "PYTHONTZPATH": ""},
        )  # fmt: skip
        self.assertEqual(python.stdout, "UTC\n")
        self.assertIn("install the package tzdata", python.stderr)


class ScheduleTest(BrokerTest):
    """Messages that are posted at certain times; the wall clock is 2026-11-26 00:00:30 in UTC."""

    def setUp(self):
        super().setUp()
        self.clock.now = datetime.datetime.fromisoformat("2026-11-26T00:00:30+00:00").timestamp()
        self.restart()
        self.schedules = self.broker.schedules

    def restart(self, **options):
        self.schedules = super().restart(**options).schedules
        return self.broker

    def after(self, seconds, channel="q"):
        """The bodies that were posted after so many seconds more."""
        self.clock.now += seconds
        self.schedules.post_due()
        taken = self.broker.take(self.broker.consumer([channel], 1_000, auto=True))
        return [message.body for message in taken]

    def put(self, body=b"x", cron=None, every=None, name="s", **options):
        self.schedules.put(name, "q", body, cron=cron, every=every, **options)

    def next_in(self, name="s"):
        return self.schedules.next_due(self.schedules.read(name))[0]

    def test_it_posts_at_each_due_time(self):
        self.put(b"cron", "*/2 * * * *", priority=2, headers={"A": "1"})
        self.put(b"every", every=45, name="e")
        self.assertEqual(self.after(44), [])
        self.assertEqual(self.after(1), [b"every"])
        self.assertEqual(self.after(44), [])
        self.assertEqual(self.after(1), [b"every", b"cron"])
        self.clock.now += 120
        self.schedules.post_due()
        self.broker.get("q")
        message = self.broker.get("q")
        self.assertEqual((message.priority, message.headers), (2, {"a": "1"}))
        schedule = self.schedules.read("s")
        self.assertEqual(schedule.last_id, message.id)
        self.assertEqual(schedule.last_at, self.clock.now)
        self.assertEqual(self.next_in(), 120)

    def test_cron_is_due_to_the_second(self):
        self.put(cron="* * * * *")
        self.assertEqual([self.after(seconds) for seconds in (1, 28, 1)], [[], [], [b"x"]])

    def test_the_ticker_posts_what_is_due(self):
        self.hasten_ticks()
        self.broker.schedules.put("s", "q", b"x", every=1)
        waiting = self.park("q")
        self.clock.now += 1
        self.assertEqual(waiting.result(PATIENCE).body, b"x")

    def test_the_ticker_sleeps_until_something_is_due(self):
        self.put(every=1)
        self.put(cron="* * * * *", name="c")
        self.assertEqual(self.after(0.75), [])
        timers = self.broker._state.timers
        self.assertAlmostEqual(timers._time_to_sleep(), 0.25, 5)
        self.schedules.remove("s")
        self.after(0.25)
        self.assertAlmostEqual(timers.tick_at, self.clock.now + 29, 5)

    def test_what_was_missed_while_down_is_posted_once(self):
        self.put(b"cron", "* * * * *")
        self.put(b"every", every=7, name="e")
        self.put(b"no", "* * * * *", name="n", catch_up=False)
        self.broker.close()
        self.clock.now += 86_400
        self.broker = self.open()
        self.schedules = self.broker.schedules
        self.assertEqual(self.after(0), [b"cron", b"every"])
        self.assertEqual((self.next_in(), self.next_in("n")), (30, 30))
        self.assertEqual(self.next_in("e"), 7 - 86_400 % 7)
        self.assertEqual(sorted(self.after(30)), [b"cron", b"every", b"no"])

    def test_a_due_time_that_is_a_little_late_is_not_missed(self):
        self.put(b"no", "*/10 * * * *", catch_up=False)
        self.assertEqual(self.after(570 + 59), [b"no"])
        self.assertEqual(self.after(600 + 1), [])
        self.assertEqual(self.next_in(), 540)

    def test_each_due_time_is_done_once_over_restarts_and_by_several_servers(self):
        self.put(every=60)
        others = [linger.Schedules(self.broker._state, self.broker._new_message) for _ in range(4)]
        stale = self.schedules._operation(self.schedules.read("s"), self.clock.now + 60, 0)
        self.clock.now += 60
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda other: other.post_due(), others))
        self.assertEqual(self.after(0), [b"x"])
        self.broker._committer.submit(stale)
        self.assertEqual(self.after(0), [])
        self.restart()
        self.assertEqual(self.after(0), [])
        self.assertEqual(self.next_in(), 60)

    def test_broker_time_is_recorded_while_there_is_a_schedule(self):
        self.put(every=60)
        self.clock.now += 61
        record = self.broker._clock.record(idle=True)
        self.assertEqual(self.broker._committer.run(record)[0][0], 1)

    def test_what_was_changed_is_not_posted_as_it_was(self):
        self.put(b"old", every=60)
        stale = self.schedules._operation(self.schedules.read("s"), self.clock.now + 60, 0)
        self.put(b"new", every=60)
        self.broker._committer.submit(stale)
        self.assertEqual(self.after(60), [b"new"])

    def test_the_same_times_given_again_keep_the_next_one(self):
        self.put(b"old", every=60)
        self.clock.now += 40
        self.put(b"new", every=60)
        self.assertEqual(self.next_in(), 20)
        self.put(b"new", every=61)
        self.assertEqual(self.next_in(), 61)
        self.put(cron="5 3 * * *")
        self.put(cron="5 4 * * *")
        self.assertEqual(self.next_in(), 4 * 3_600 + 300 - 70)
        east = datetime.timezone(datetime.timedelta(hours=2))
        with unittest.mock.patch.object(linger, "find_zone", return_value=east):
            self.put(cron="5 4 * * *", tz="East")
        self.assertEqual(self.next_in(), 2 * 3_600 + 300 - 70)

    def test_a_schedule_is_replaced_whole(self):
        self.put(b"old", every=60, priority=1)
        self.broker.set_settings("q", hlm=1)
        self.broker.post("q", b"first")
        self.clock.now += 60
        self.schedules.post_due()
        self.assertIn("mark", self.schedules.read("s").last_error)
        new = {"cron": "0 3 * * *", "catch_up": False, "priority": 2}
        with self.assertRaises(linger.Conflict):
            self.schedules.put("s", "r", b"new", "x/new", **new, expected_channel="other")
        with unittest.mock.patch.object(linger, "find_zone", return_value=datetime.timezone.utc):
            self.schedules.put("s", "r", b"new", "x/new", **new, tz="Zone", expected_channel="q")
        shown = self.schedules.read("s")
        self.assertEqual(shown[:6], ("s", "r", "0 3 * * *", "Zone", 0, 0))
        self.assertEqual((shown.last_error, shown.parameters), ("", '{"priority": 2}'))
        self.assertEqual((shown.type, shown.body), ("x/new", b"new"))

    def test_only_cron_follows_the_wall_clock(self):
        self.put(b"every", every=60)
        self.put(b"cron", "0 * * * *", name="c")
        self.clock.ahead = 3_600
        self.assertEqual(self.after(1), [b"cron"])
        self.assertEqual(self.after(59), [b"every"])

    def test_a_wall_clock_that_is_set_back_a_little_repeats_nothing(self):
        self.put(cron="*/10 * * * *")
        self.assertEqual(self.after(570), [b"x"])
        self.clock.ahead = -3_600
        self.assertEqual([self.after(600) for _ in range(6)], [[]] * 6)
        self.assertEqual(self.after(600), [b"x"])

    def test_a_wall_clock_that_was_wrong_stops_no_schedule(self):
        self.put(cron="*/10 * * * *")
        self.clock.ahead = 9e8
        self.assertEqual(self.after(1), [b"x"])
        self.clock.ahead = 0
        self.assertEqual(self.after(1), [])
        self.assertEqual(self.after(568), [b"x"])

    def test_a_wall_clock_that_was_wrong_before_the_start_stops_no_schedule(self):
        self.clock.ahead = 9e8
        self.put(cron="*/10 * * * *")
        self.broker.close()
        self.clock.ahead = 0
        self.broker = self.open()
        self.schedules = self.broker.schedules
        self.assertEqual(self.after(0), [])
        self.assertEqual(self.next_in(), 570)

    def test_one_that_was_given_again_while_the_clock_was_wrong_is_due(self):
        for crons, ahead in ((("*/10 * * * *", "*/10 * * * *"), (9e8, 0)),
                             (("0 * * * *", "*/10 * * * *"), (0, 9e8))):  # fmt: skip
            for cron, self.clock.ahead in zip(crons, ahead):
                self.put(cron=cron, name=crons[0])
            self.clock.ahead = 0
            self.assertEqual(self.after(1), [])
            self.assertEqual(self.after(self.next_in(crons[0])), [b"x"])
            self.assertLessEqual(self.clock.time() % 86_400, 1_200)
            self.schedules.remove(crons[0])

    def test_a_post_that_is_refused_says_why(self):
        self.put(every=60)
        self.broker.set_settings("q", hlm=1)
        self.assertEqual(self.broker.post("q", b"first").id, 1)
        self.clock.now += 60
        self.schedules.post_due()
        schedule = self.schedules.read("s")
        self.assertIn("high-level mark of 1", schedule.last_error)
        self.assertIsNone(schedule.last_id)
        self.assertEqual(self.after(0), [b"first"])
        self.broker.clear_settings("q")
        self.broker.max_message = 0
        self.assertEqual(self.after(60), [])
        self.assertIn("1 bytes", self.schedules.read("s").last_error)
        self.broker.max_message = 1
        self.assertEqual(self.after(60), [b"x"])
        self.assertEqual(self.schedules.read("s").last_error, "")

    def test_a_zone_that_is_gone_is_tried_again(self):
        self.put(cron="@hourly")
        with unittest.mock.patch.object(linger, "find_zone", side_effect=linger.BadRequest("gone")):
            self.assertEqual(self.after(3_570), [])
            self.assertEqual(self.schedules.read("s").last_error, "gone")
            self.assertEqual(self.next_in(), linger.SCHEDULE_LOOK)
        self.assertEqual(self.after(60), [b"x"])
        self.assertEqual(self.next_in(), 3_540)

    def test_a_database_that_fails_leaves_the_due_time(self):
        self.put(every=60)
        failing = unittest.mock.patch.object(linger, "POST_SCHEDULED", "select 1 from missing")
        with failing, self.assertRaises(linger.LingerError):
            self.after(60)
        self.assertEqual(self.after(1), [b"x"])

    def test_a_unique_key_keeps_messages_from_piling_up(self):
        self.put(every=60, unique="k")
        for _ in range(2):
            self.clock.now += 60
            self.schedules.post_due()
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 0})
        schedule = self.schedules.read("s")
        self.assertEqual((schedule.last_id, schedule.last_error), (1, ""))

    def test_a_waiting_consumer_gets_the_message_at_once(self):
        self.put(every=60)
        future = self.park("q")
        self.clock.now += 60
        self.schedules.post_due()
        self.assertEqual(future.result(PATIENCE).body, b"x")

    def test_many_that_are_due_at_once_are_all_posted(self):
        for n in range(150):
            self.put(b"%d" % n, every=60, name=str(n))
        self.assertEqual(sorted(map(int, self.after(60))), list(range(150)))

    def test_none_of_those_that_are_due_at_once_waits_for_the_commit_of_another(self):
        for n in range(3):
            self.put(every=60, name=str(n))
        self.clock.now += 60
        steps, committer = [], self.broker._committer
        read, submit = self.schedules.read, committer.submit

        def logged_read(name):
            steps.append("read")
            return read(name)

        def logged_submit(operation):
            if isinstance(operation, linger.PostScheduled):
                steps.append("submit")
            submit(operation)

        self.schedules.read, committer.submit = logged_read, logged_submit
        self.schedules.post_due()
        self.assertEqual(steps, ["read"] * 3 + ["submit"] * 3)

    def test_it_can_be_posted_now_and_stays_due(self):
        self.put(every=60)
        self.assertEqual(self.schedules.post("s").id, 1)
        self.assertEqual(self.next_in(), 60)
        with self.assertRaises(linger.NotFound):
            self.schedules.post("s", expected_channel="other")

    def test_one_that_was_deleted_posts_nothing(self):
        self.put(every=60)
        with self.assertRaises(linger.NotFound):
            self.schedules.remove("s", expected_channel="other")
        self.schedules.remove("s")
        self.assertEqual(self.after(60), [])
        for call in (self.schedules.remove, self.schedules.read, self.schedules.post):
            with self.assertRaisesRegex(linger.NotFound, "no schedule s"):
                call("s")

    def test_one_that_is_deleted_as_it_becomes_due_stops_no_other(self):
        self.put(every=60)
        self.clock.now += 60
        self.schedules._do(["gone", "s"], *self.schedules._clocks())
        self.assertEqual(self.after(0), [b"x"])

    def test_what_is_wrong_is_refused_and_changes_nothing(self):
        for options, words in (
            ({}, "either"), ({"cron": "@daily", "every": 1}, "either"),
            ({"every": 1, "tz": "UTC"}, "either"), ({"every": 0}, "every"),
            ({"every": linger.MAX_EVERY + 1}, "every"), ({"every": 1, "body": b""}, "empty"),
            ({"every": 1, "name": "\n"}, "schedule's name"), ({"every": 1, "dedup": "k"}, "dedup"),
            ({"every": 1, "timeout": 0}, "timeout"), ({"every": 1, "delay": 9, "linger": 9}, "de")
        ):  # fmt: skip
            with self.subTest(words), self.assertRaisesRegex(linger.BadRequest, words):
                self.put(**options)
        self.assertEqual(self.schedules.read_all(), [])

    def test_their_number_is_limited(self):
        self.hasten(MAX_SCHEDULES=2)
        for name in "ab":
            self.put(every=60, name=name)
        with self.assertRaisesRegex(linger.Full, "2 schedules"):
            self.put(every=60, name="c")
        self.put(b"new", every=60, name="b")
        self.assertEqual([s.body for s in self.schedules.read_all()], [b"x", b"new"])


COUNTS = (  # of each channel: counted anew, and as they are kept
    "select channel, sum(state = 0), sum(state = 1), sum(state = 2), sum(blocked),"
    " sum(priority < 0), sum(priority > 0) from messages group by channel order by channel",
    "select name, ready, in_flight, delayed, blocked, urgent, niced from channels order by name",
)


class ModelTest(BrokerTest):
    """Random calls, and after each the counts that are kept against the rows."""

    STEPS = 1_500

    def test_kept_counts_agree_with_the_rows_whatever_happens(self):
        chance = random.Random(7)
        for step in range(self.STEPS):
            channel, id = chance.choice("abc"), chance.randrange(1, 80 + step // 4)
            call = chance.randrange(12)
            with contextlib.suppress(linger.LingerError):
                if call < 4:
                    self.broker.post(
                        channel, b"x", priority=chance.randrange(-1, 2),
                        timeout=chance.randint(1, 9), deliver=chance.randrange(3),
                        linger=chance.choice((0, 0, 20)),
                        delay=chance.choice((0, 0, 5)), dead=chance.choice(("", "a", "b")),
                        backoff=chance.choice(("", "3,6")), unique=chance.choice((None, "k")),
                    )  # fmt: skip
                elif call < 6:
                    names = chance.sample("abc", chance.randint(1, 3))
                    auto = chance.random() < 0.2
                    consumer = self.broker.consumer(names, n=chance.randint(1, 3), auto=auto)
                    taken = self.broker.take(consumer)
                    if taken and chance.random() < 0.3:
                        self.broker.undo_take(consumer, taken)
                elif call < 10:
                    methods = (self.broker.delete, self.broker.release, self.broker.reject)
                    chance.choice((*methods, self.broker.touch))(id)
                elif call == 10:
                    self.broker.redrive(channel)
                    if chance.random() < 0.5:
                        self.broker.redrive_message(id + 1, chance.choice((None, "c")))
                    self.broker.change(
                        id, priority=chance.choice((None, -1, 0, 1)),
                        delay=chance.choice((None, 0, 5)), deliver=chance.randrange(3),
                    )  # fmt: skip
                else:
                    self.clock.now += chance.random() * 4
            if step % 10 == 0:
                self.check_counts()
        self.broker.drain("a")
        self.broker.drain("b")
        self.broker.drain("c")
        self.assertEqual(self.broker._committer.read("select * from channels"), [[]])

    def check_counts(self):
        counted, kept = self.broker._committer.read(*COUNTS)
        self.assertEqual(counted, kept)


# -- Cluster -------------------------------------------------------------------------------------

RQLITED = os.environ.get("LINGER_TEST_RQLITED")  # the program of real nodes
# For the files of nodes, which sync each write, three of them on one disk; a killed one keeps them.
MEMORY_FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
PREPARE_ERROR = re.compile(r'no such|near "|.* already exists')  # does not end a transaction


class Rqlite(http.server.ThreadingHTTPServer):
    """A stand-in for nodes of rqlite that share a database; `faults` are what goes wrong.

    Each request to write takes the next one: None, `drop` (closes the connection before it is
    executed), `lose` (after), `late` (closes it, and executes it in `replay`), `stall` (answers
    in `stalled.set`), a status with its text, or `leader <n>`: redirects to the n-th node.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, nodes=1):
        self.database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        for name, count, function in (
            ("sqlite_version", 0, lambda: "3.45.1"),
            ("unhex", 1, lambda digits: digits and bytes.fromhex(digits)),
        ):
            self.database.create_function(name, count, function)
        self.lock = threading.Lock()  # guards the database and the lists
        self.faults = []
        self.delayed = []  # requests that are executed by `replay`
        self.writes = []  # bodies of all requests to write that were executed
        self.read_faults = []  # the same for requests that read
        self.asked = collections.Counter()  # requests to write, by the node's port
        self.paths = []  # of requests
        self.login = None  # the last Authorization
        self.stalled = threading.Event()
        super().__init__(("127.0.0.1", 0), RqliteHandler)
        self.others = [Node(self) for _ in range(nodes - 1)]
        self.addresses = [f"127.0.0.1:{s.server_address[1]}" for s in (self, *self.others)]
        self.url = "http://" + ",".join(self.addresses)
        for server in (self, *self.others):
            threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()

    def close(self):
        self.stalled.set()
        for server in (self, *self.others):
            server.shutdown()
            server.server_close()
        self.database.close()

    def handle_error(self, request, address):
        """The client has closed the connection."""

    def replay(self):
        """Executes what was `late`; the results."""
        delayed, self.delayed = self.delayed, []
        return [self.execute(body) for body in delayed]

    def execute(self, body, query="transaction"):
        """The results of a request, as rqlite gives them."""
        results = []
        with self.lock:
            if "level" not in query:
                self.writes.append(body)
            self.database.execute("begin")
            for statement, *parameters in json.loads(body):
                try:
                    results.append(self._result(statement, *parameters))
                except sqlite3.Error as error:
                    results.append({"error": str(error)})
                    if not PREPARE_ERROR.match(str(error)):
                        self.database.execute("rollback")
                        break
            else:
                self.database.execute("commit")
        return results

    def _result(self, statement, parameters=types.MappingProxyType({})):
        given = dict(parameters)
        for name, value in given.items():
            if isinstance(value, str) and linger.LOOKS_LIKE_BLOB.fullmatch(value):
                given[name] = bytes.fromhex(value[2:-1])  # as some versions of rqlite do
        cursor = self.database.execute(statement, given)
        if cursor.description is None:
            rows = self.database.execute("select changes(), last_insert_rowid()").fetchone()
            changed = max(cursor.rowcount, 0)
            return {"rows_affected": changed, "last_insert_id": rows[1], "time": 1e-6}
        columns = [column[0] for column in cursor.description]
        rows = [list(row) for row in cursor]
        for row in rows:
            for i, value in enumerate(row):
                if isinstance(value, bytes):
                    assert columns[i] == "body", "rqlite takes other blobs for texts"
                    row[i] = base64.b64encode(value).decode()
        types = ["blob" if column == "body" else "" for column in columns]
        return {"columns": columns, "types": types, **({"values": rows} if rows else {})}


class Node(http.server.ThreadingHTTPServer):
    """Another node of a cluster."""

    daemon_threads = True

    def __init__(self, cluster):
        self.cluster = cluster
        super().__init__(("127.0.0.1", 0), RqliteHandler)

    def handle_error(self, request, address):
        """The client has closed the connection."""


class RqliteHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        cluster = getattr(self.server, "cluster", self.server)
        assert self.path.startswith("/db/backup"), self.path
        with tempfile.NamedTemporaryFile() as file, cluster.lock:
            with contextlib.closing(sqlite3.connect(file.name)) as copy:
                cluster.database.backup(copy)
                copy.execute("pragma journal_mode = wal").fetchall()
            self.answer(200, file.read())

    def load(self, cluster, content):
        with tempfile.NamedTemporaryFile() as file, cluster.lock:
            file.write(content)
            file.flush()
            with contextlib.closing(sqlite3.connect(file.name)) as source:
                source.backup(cluster.database)

    def do_POST(self):
        cluster = getattr(self.server, "cluster", self.server)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/db/load"):
            self.load(cluster, body)
            body = b'[["select 1"]]'
        with cluster.lock:
            writes = "/db/query" not in self.path
            faults = cluster.faults if writes else cluster.read_faults
            fault = faults.pop(0) if faults else None
            cluster.asked[self.server.server_address[1]] += writes
            cluster.paths.append(self.path.encode())
            cluster.login = self.headers["Authorization"]
        if fault == "stall":
            cluster.stalled.wait(PATIENCE)
        if fault == "late":
            cluster.delayed.append(body)
        if fault in ("drop", "late"):
            self.close_connection = True
        elif isinstance(fault, tuple):
            self.answer(fault[0], fault[1].encode())
        elif isinstance(fault, str) and fault.startswith("leader"):
            leader = f"http://{cluster.addresses[int(fault[-1])]}{self.path}"
            self.answer(301, b"", {"Location": leader})
        else:
            results = cluster.execute(body, urllib.parse.urlsplit(self.path).query)
            if fault == "lose":
                self.close_connection = True
            else:
                self.answer(200, json.dumps({"results": results}).encode())

    def answer(self, status, body, headers=types.MappingProxyType({})):
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n{lines}\r\n"
        self.wfile.write(head.encode() + body)

    def log_message(self, *_):
        """Nothing."""


class RealRqlite:
    """Three nodes of rqlite, each a process, started for all tests; `reset` empties them."""

    running = None

    @classmethod
    def get(cls):
        """The nodes with an empty database."""
        if cls.running is None:
            cls.running = cls()
        cls.running.reset()
        return cls.running

    def __init__(self):
        folder = tempfile.TemporaryDirectory(prefix="linger-test-", dir=MEMORY_FOLDER)
        unittest.addModuleCleanup(folder.cleanup)
        ports = free_ports(6)
        self.url = "http://" + ",".join(f"127.0.0.1:{port}" for port in ports[:3])
        nodes = [
            RqliteNode(Path(folder.name), number, ports[number], ports[3 + number], ports[3:])
            for number in range(3)
        ]
        for node in nodes:
            unittest.addModuleCleanup(node.kill)
        until(lambda: all(node.is_ready() for node in nodes))

    def reset(self):
        nodes = linger.Nodes(linger.ClusterUrl.parse(self.url))
        listed = "select type, name from sqlite_master where name not glob 'sqlite_*'"
        (found,), _ = nodes.ask("/db/query?level=strong", lambda: json.dumps([listed]).encode())
        names = found.get("values", ())
        drops = [f"drop {kind} {name}" for kind, name in names if kind != "index"]
        drops.sort(reverse=True)  # triggers before tables
        drops += ["pragma application_id = 0", "pragma user_version = 0"]
        nodes.ask("/db/request?transaction", lambda: json.dumps(drops).encode())
        nodes.close()

    def close(self):
        """Nothing: they run on."""


class ClusterTest(Folder):
    """The store on a cluster: the fence, what is not known, several servers."""

    def setUp(self):
        super().setUp()
        self.cluster = Rqlite(3)
        self.addCleanup(self.cluster.close)
        self.hasten(NODE_RETRY_DELAY=0.001, JOIN_TIMEOUT=0.1)
        self.hasten(LOOK_INTERVAL=0.01, IDLE_LOOK_INTERVAL=0.02)
        self.clock = FakeClock()

    def open(self, clock=None, **options):
        """A server without HTTP."""
        broker = linger.Broker(linger.open_store(self.cluster.url), clock=clock or self.clock)
        self.addCleanup(broker.close)
        return broker

    def quiet(self):
        """A server whose threads do nothing by themselves."""
        self.hasten(IDLE_LOOK_INTERVAL=PATIENCE, LOOK_INTERVAL=PATIENCE, TICK_INTERVAL=PATIENCE)
        broker = self.open()
        until(lambda: broker._state.timers._sleeps_until > broker.now())  # after its first tick
        return broker

    def count(self, broker):
        ((count,),) = broker._store.read("select count(*) from messages")[0]
        return count

    # -- the fence

    def test_a_request_that_did_not_arrive_is_sent_again(self):
        broker = self.quiet()
        self.cluster.faults = ["drop", (503, "leader not found"), (500, "leadership lost")]
        self.assertEqual(broker.post("q", b"x").id, 1)
        self.assertEqual(self.count(broker), 1)

    def test_a_request_of_which_only_the_answer_was_lost_is_done_once_and_not_known(self):
        broker = self.quiet()
        for _ in range(2):
            self.cluster.faults = ["lose"]
            with self.assertRaisesRegex(linger.OutcomeUnknown, "answer was lost"):
                broker.post("q", b"x")
        self.assertEqual(self.count(broker), 2)
        self.assertEqual(broker.post("q", b"x").id, 3)

    def test_a_late_request_is_not_done_after_its_repetition(self):
        broker = self.quiet()
        self.cluster.faults = ["late"]
        broker.post("q", b"x")
        broker.post("q", b"y")
        for results in self.cluster.replay():
            self.assertIn("sessions.turn", results[0]["error"])
        self.assertEqual(self.count(broker), 2)

    def test_a_late_request_that_was_given_up_is_done_before_the_next_or_never(self):
        broker = self.quiet()
        self.hasten(CLUSTER_TIMEOUT=0)
        broker._store._nodes.patience = 0
        for when in ("before", "after"):
            count = self.count(broker)
            self.cluster.faults = ["late"]
            with self.assertRaises(linger.OutcomeUnknown):
                broker.post("q", b"given up")
            broker._store._nodes.patience = PATIENCE
            if when == "before":
                self.cluster.replay()
            broker.post("q", b"x")
            self.cluster.replay()
            broker._store._nodes.patience = 0
            self.assertEqual(self.count(broker) - count, 2 if when == "before" else 1)

    def test_what_surely_no_node_has_done_is_503(self):
        broker = self.quiet()
        broker._store._nodes.patience = 0
        for status in (503, 500):
            self.cluster.faults = [(status, "leader not found")] * 3
            with self.assertRaises(linger.Unavailable):
                broker.post("q", b"x")
        self.cluster.faults = []
        self.assertEqual(self.count(broker), 0)
        broker._store._nodes.patience = PATIENCE
        self.assertEqual(broker.post("q", b"x").id, 1)

    def test_what_was_sent_to_nobody_is_503(self):
        for url, reason in (("http://127.0.0.1:1", "refused"), ("http://a..b", "label empty")):
            nodes = linger.Nodes(linger.ClusterUrl.parse(url))
            nodes.patience = 0
            with self.assertRaisesRegex(linger.Unavailable, reason):
                nodes.ask("/db/request", lambda: b"[]")

    def test_a_consumer_of_the_same_server_is_served_in_the_next_transaction(self):
        broker = self.quiet()
        taken = self.thread(broker.get, "q", PATIENCE)
        until(lambda: count_waiting(broker) == 1)
        before = len(self.cluster.writes)
        broker.post("q", b"x")
        self.assertEqual(taken.result(PATIENCE).delivered, 1)
        self.assertEqual(len(self.cluster.writes) - before, 2)

    def test_what_a_node_has_taken_and_no_other_answers_is_504(self):
        broker = self.quiet()
        broker._store._nodes.patience = 0.01
        self.cluster.faults = ["drop", *[(503, "leader not found")] * 1000]
        with self.assertRaises(linger.OutcomeUnknown) as caught:
            broker.post("q", b"x")
        self.assertEqual(caught.exception.status, 504)
        self.cluster.faults = []

    def test_a_node_that_is_silent_is_left_for_another(self):
        broker = self.quiet()
        self.hasten(NODE_TIMEOUT=0.05)
        self.cluster.faults = ["stall"]
        broker.post("q", b"x")
        self.assertEqual(self.count(broker), 1)

    def test_the_leader_is_followed_only_to_a_node_of_the_url(self):
        broker = self.quiet()
        self.cluster.faults = ["leader 2"]
        before = self.cluster.asked.copy()
        broker.post("q", b"x")
        broker.post("q", b"x")
        asked = self.cluster.asked - before
        self.assertEqual(list(asked.values()), [1, 2])
        self.assertIn(f":{list(asked)[1]}", self.cluster.addresses[2])
        self.cluster.addresses.append("127.0.0.1:1")
        self.cluster.faults = ["leader 3"]
        broker.post("q", b"x")  # that node asks the leader
        self.assertNotIn(b"redirect", self.cluster.paths[-1])

    def test_an_operation_that_is_refused_harms_no_other(self):
        broker = self.quiet()
        bad = linger.Operation(("insert into messages (id) values (null)",))
        missing = linger.Operation(("insert into nowhere (id) values (1)",))
        for operation in (bad, missing):
            with busy(broker._committer):
                posts = [self.thread(broker.post, "q", b"x")]
                until(lambda: len(broker._committer._pending) == 1)
                broker._committer.submit(operation)
                posts.append(self.thread(broker.post, "q", b"x"))
                until(lambda: len(broker._committer._pending) == 3)
            ids = [post.result(PATIENCE).id for post in posts]
            self.assertEqual(ids[1], ids[0] + 1)
            self.assertRaises(linger.LingerError, operation.rows)
        self.assertEqual(self.count(broker), 4)

    def test_each_try_has_the_time_of_its_own(self):
        broker = self.quiet()
        broker.post("q", b"x", timeout=10)
        self.hasten(NODE_TIMEOUT=0.3)
        self.cluster.faults = ["stall"]
        taken = self.thread(broker.get, "q")
        until(lambda: not self.cluster.faults)
        self.clock.now += 5
        taken.result(PATIENCE)
        (((due,),),) = broker._store.read("select due_at from messages")
        self.assertEqual(due, broker.now() + 10)

    def test_a_session_that_was_forgotten_begins_anew(self):
        broker = self.quiet()
        broker.post("q", b"x")
        self.cluster.database.execute("delete from sessions")
        self.assertEqual(broker.post("q", b"x").id, 2)

    def test_a_cluster_that_was_restored_from_a_backup_is_no_end(self):
        broker = self.quiet()
        broker.post("q", b"x")
        self.cluster.database.execute("update sessions set turn = 1")
        self.assertEqual(broker.post("q", b"x").id, 2)

    def test_sessions_of_servers_that_were_killed_are_forgotten(self):
        broker = self.quiet()
        self.cluster.database.execute("insert into sessions values ('gone', 9, ?)", (broker.now(),))
        sessions = "select count(*) from sessions where name = 'gone'"
        for seconds, count in ((linger.SESSION_TTL - 60, 1), (120, 0)):
            self.clock.now += seconds
            broker.post("q", b"x")
            self.open().close()
            self.assertEqual(broker._store.read(sessions), [[(count,)]])
        broker.close()
        self.assertEqual(self.cluster.database.execute(sessions[:29]).fetchall(), [(0,)])

    def test_a_batch_is_one_statement_and_keeps_every_value(self):
        broker = self.quiet()
        bodies = (bytes(range(256)), '"é\\'.encode(), b"x'41'")
        parameters = (
            {"priority": linger.MIN_INTEGER, "dead": "d'\""},
            {"delay": 5, "backoff": "1,2"},
            {"timeout": linger.MAX_INTEGER // 10**9, "linger": 9, "deliver": 3},
        )
        items = [(body, "x'41'", given) for body, given in zip(bodies, parameters)]
        before = len(self.cluster.writes)
        ids = broker.post_batch("q", items)
        (write,) = self.cluster.writes[before:]
        self.assertEqual(write.count(b"insert into messages"), 1)
        file = linger.Broker(linger.Store(), clock=self.clock)
        self.addCleanup(file.close)
        file.post_batch("q", items)
        for id in ids:
            self.assertEqual(broker.read_message(id), file.read_message(id))

    # -- several servers

    def test_servers_that_start_at_once_create_one_database(self):
        stores = [self.thread(linger.open_store, self.cluster.url) for _ in range(6)]
        brokers = [linger.Broker(store.result(PATIENCE), clock=self.clock) for store in stores]
        for broker in brokers:
            self.addCleanup(broker.close)
        self.assertEqual(len({broker.id for broker in brokers}), 1)
        for broker in brokers:
            broker.post("q", b"x")
        self.assertEqual(self.count(broker), 6)

    def test_a_message_wakes_a_consumer_of_another_server(self):
        first, second = self.open(), self.open()
        for make_ready in (
            lambda: second.post("q", b"x"),
            lambda: second.post_batch("q", [(b"x", "x/y", {})]),
            lambda: (second.post("q", b"x", delay=5), self.clock.pass_time(5)),
            lambda: (second.pause("q"), second.post("q", b"x"), second.resume("q")),
        ):
            taken = self.thread(first.get, "q", PATIENCE)
            until(lambda: count_waiting(first) == 1)
            make_ready()
            message = taken.result(PATIENCE)
            self.assertEqual((message.body, message.delivered), (b"x", 1))
            second.delete(message.id, message.lease)

    def test_a_timeout_is_processed_by_another_server(self):
        first, second = self.open(), self.open()
        first.post("q", b"x", timeout=10)
        first.get("q")
        first._watch.stop()
        first._state.timers.stop()  # as if it had been killed
        self.clock.now += 9
        until(lambda: second._state.timers.is_due("q", self.clock.now + 1))
        self.clock.now += 1
        self.assertEqual(second.get("q").delivered, 2)

    def test_a_pause_holds_at_once_on_all_servers(self):
        first, second = self.quiet(), self.quiet()
        first.post("q", b"x")
        first.pause("q")
        self.assertIsNone(second.get("q"))
        self.assertEqual(second.take(second.consumer(["q", "p"], 5)), [])
        first.resume("q")
        self.assertEqual(second.get("q").body, b"x")

    def test_settings_and_pauses_are_learned(self):
        first, second = self.open(), self.open()
        first.set_settings("q", deliver=3)
        first.pause("p", 100)
        until(lambda: second.settings("q") == {"deliver": 3} and second.info("p")["paused"])
        first.clear_settings("q")
        first.resume("p")
        until(lambda: second.settings("q") == {} and not second.info("p")["paused"])

    def test_a_server_that_joins_has_the_time_of_the_others_and_not_of_its_clock(self):
        self.hasten(JOIN_TIMEOUT=PATIENCE)
        first = self.open(ClockAhead(-DAY))
        for ahead in (DAY, -2 * DAY):
            second = self.open(ClockAhead(ahead))
            self.assertAlmostEqual(second.now(), first.now(), delta=1)
            second.close()

    def test_the_time_that_others_record_may_come_late(self):
        """When there was no leader: it is then older, as the wall clock says, but not by more."""
        for passed, max_age, expected in ((3, 5, 3), (100, 5, 5), (-100, 5, 0)):
            record = f"50.0 {self.clock.time() - passed}"
            self.assertEqual(linger.BrokerClock(self.clock, record, max_age).now(), 50 + expected)
        self.hasten(JOIN_TIMEOUT=PATIENCE)
        first = self.open()
        store = linger.Cluster(self.cluster.url)
        self.addCleanup(store.close)
        with busy(first._committer):
            joining = self.thread(store.join, self.clock.time)
            until(lambda: first._committer._pending)
            began = time.monotonic()
            with self.cluster.lock:  # a record from before the session, which comes late
                self.cluster.database.execute("update config set value = '1 1' where key = 'time'")
            until(lambda: time.monotonic() > began + 0.2)
            self.assertFalse(joining.done())
        record, max_age = joining.result(PATIENCE)
        self.assertGreater(max_age, 0.2)
        self.assertEqual(record.split()[0], f"{self.clock.now:.6f}")

    def test_a_server_that_is_behind_catches_up(self):
        first, second = self.open(), self.open(FakeClock())
        self.clock.now += 100
        first.post("q", b"x")
        until(lambda: second.now() >= first.now())
        self.assertEqual(second.now(), first.now())

    # -- what cannot be opened

    def test_what_is_no_cluster_of_linger_is_refused_with_a_sentence(self):
        for url, reason in (
            ("http://", "must be like http://node1"),
            ("http://a:1,b:x", "must be like"),
            ("http://user:secret@a/path", "not http://a/path"),
        ):
            with self.assertRaisesRegex(linger.BadRequest, reason):
                linger.open_store(url)
        with self.assertRaisesRegex(linger.BadRequest, "sync is for a file"):
            linger.open_store(self.cluster.url, "off")
        with self.assertRaisesRegex(linger.BadRequest, "max-db-size is for a file"):
            linger.open_store(self.cluster.url, max_size=1)
        for change, reason in (
            ("create table theirs (x)", "of another program"),
            (f"pragma application_id = {linger.APPLICATION_ID}", "never released"),
            ("pragma user_version = 99", "use the newer Linger"),
        ):
            self.cluster.database.execute(change)
            with self.assertRaisesRegex(linger.Unavailable, reason):
                linger.open_store(self.cluster.url)

    def test_what_does_not_answer_as_rqlite_is_refused_with_a_sentence(self):
        self.hasten(CLUSTER_TIMEOUT=0)
        for answer, reason in (
            ((404, "no"), "is no rqlite, or one that is too old: Linger was tried with"),
            ((401, "no"), "refuses the user or the password"),
            ((200, "<html>"), "does not answer as rqlite: <html>"),
            ((200, '{"results": [], "error": "leadership lost"}'), "leadership lost"),
            ((503, "leader not found"), "does not answer.*leader not found"),
        ):
            self.cluster.read_faults = [answer]
            with self.assertRaisesRegex(linger.Unavailable, reason):
                linger.open_store(self.cluster.url)
        self.cluster.database.create_function("sqlite_version", 0, lambda: "3.36.0")
        with self.assertRaisesRegex(linger.Unavailable, "SQLite 3.36.0 and is too old"):
            linger.open_store(self.cluster.url)
        self.cluster.close()
        with self.assertRaisesRegex(linger.Unavailable, "does not answer.*refused"):
            linger.open_store(self.cluster.url)

    def test_the_password_is_sent_and_never_shown(self):
        url = self.cluster.url.replace("http://", "http://me:se%40cret@")
        with contextlib.closing(linger.Broker(linger.open_store(url))) as broker:
            self.assertEqual(
                broker.stats()["db-file"], self.cluster.url.replace("http://", "http://me@")
            )
        self.assertEqual(self.cluster.login, "Basic " + base64.b64encode(b"me:se@cret").decode())
        password = {"LINGER_DB_PASSWORD": "other"}
        with unittest.mock.patch.dict(os.environ, password):
            linger.open_store(url.replace(":se%40cret", "")).close()
        self.assertEqual(self.cluster.login, "Basic " + base64.b64encode(b"me:other").decode())

    def test_https_needs_a_certificate_that_is_trusted(self):
        path = self.folder / "cert.pem"
        path.write_text(CERTIFICATE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        self.cluster.socket = context.wrap_socket(self.cluster.socket, server_side=True)
        url = f"https://localhost:{self.cluster.server_address[1]}"
        self.hasten(CLUSTER_TIMEOUT=0)
        with self.assertRaisesRegex(linger.Unavailable, "certificate"):
            linger.open_store(url)
        with unittest.mock.patch.dict(os.environ, SSL_CERT_FILE=str(path)):
            linger.open_store(url).close()

    def test_text_that_looks_like_a_blob_stays_a_text(self):
        broker = self.quiet()
        for text in ("x'41'", "X''", "x'4142'", "a'b\"c"):
            broker.post("q", text.encode(), text, unique=text)
            message = broker.get("q")
            self.assertEqual((message.type, message.body), (text, text.encode()))
            broker.release(message.id, reason=text)
            message = broker.get("q")
            self.assertEqual(message.error, text)
            broker.delete(message.id)


class CopyTest(Folder):
    """Backups of a cluster, and `linger copy`."""

    def setUp(self):
        super().setUp()
        self.cluster = Rqlite()
        self.addCleanup(self.cluster.close)
        self.hasten(NODE_RETRY_DELAY=0.001, JOIN_TIMEOUT=0.1)

    def open(self, path):
        """A server without HTTP."""
        broker = linger.Broker(linger.open_store(path))
        self.addCleanup(broker.close)
        return broker

    def fill(self, broker):
        for body in (b"taken", bytes(range(256)), b"deleted"):
            key = body.hex()[:9]
            broker.post("q", body, priority=-(2**63), dead="d", dedup=key, unique=key)
        self.taken = broker.get("q", timeout=1000)
        broker.delete(3)
        broker.subscribe("q", "t", timeout=7)
        broker.set_settings("q", deliver=3)
        broker.pause("p")

    @staticmethod
    def contents(path):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            return [line for line in connection.iterdump() if "'leases'" not in line]

    def copy(self, source, target):
        output = io.TextIOWrapper(io.BytesIO())
        with contextlib.redirect_stdout(output):
            self.assertEqual(linger.main(["copy", source, target]), 0)
        return output.buffer.getvalue()

    def test_a_database_moves_to_a_cluster_and_back_with_all_that_is_in_it(self):
        broker = self.open(self.dbfile)
        self.fill(broker)
        broker.close()
        back = str(self.folder / "back.db")
        self.assertEqual(self.copy(self.dbfile, self.cluster.url), b"2\n")
        self.assertEqual(self.copy(self.cluster.url, back), b"2\n")
        self.assertEqual(self.contents(back), self.contents(self.dbfile))
        for path in (back, self.cluster.url):
            broker = self.open(path)
            broker.touch(self.taken.id, self.taken.lease)
            self.assertEqual((broker.post("q", b"x").id, broker.id), (4, broker.id))
            broker.close()

    def test_leases_that_may_have_been_given_out_are_not_given_out_on_the_cluster(self):
        broker = self.open(self.dbfile)
        self.fill(broker)
        broker.close()
        with contextlib.closing(sqlite3.connect(self.dbfile)) as connection:
            connection.execute("update config set value = '7 open' where key = 'leases'")
            connection.commit()  # as a power failure leaves it
        self.copy(self.dbfile, self.cluster.url)
        self.assertGreater(self.open(self.cluster.url).get("q").lease, 7)

    def test_a_copy_is_refused_with_a_sentence(self):
        full = self.open(self.cluster.url)
        self.fill(full)
        other = Rqlite()
        self.addCleanup(other.close)
        self.hasten(JOIN_TIMEOUT=PATIENCE, IDLE_LOOK_INTERVAL=0.01)
        used = str(self.folder / "used.db")
        self.open(used)
        for source, target, reason in (
            (self.cluster.url, self.dbfile, "a server uses http"),
            (used, self.dbfile, "in use"),
            (str(self.folder / "none"), self.dbfile, "there is no database"),
            (other.url, self.dbfile, "there is no database of Linger at http"),
        ):
            with self.assertRaisesRegex(linger.LingerError, reason):
                linger.copy_database(source, target)
        full.close()
        linger.copy_database(self.cluster.url, self.dbfile)
        for target, reason in (
            (
                self.cluster.url,
                "is not empty: it has messages, subscriptions, settings, pauses, de",
            ),
            (self.dbfile, "there is already a file"),
        ):
            with self.assertRaisesRegex(linger.Conflict, reason):
                linger.copy_database(self.cluster.url, target)

    def test_every_table_is_looked_at_before_a_database_is_replaced(self):
        tables = re.findall(r"create table (\w+)", " ".join(linger.SCHEMA))
        found = re.findall(r"from (\w+)", linger.FIND_STORED)
        self.assertEqual({*tables} - {*found}, {"config", "messages", "picked", "sessions"})

    def test_a_server_starts_from_the_backup_of_a_cluster(self):
        broker = self.open(self.cluster.url)
        self.fill(broker)
        backup = str(self.folder / "backup.db")
        broker.backup(backup)
        with broker.open_copy() as copy, open(backup, "rb") as file:
            self.assertEqual(copy.read(100), file.read(100))
        self.assertEqual(self.open(backup).channel_stats("q"), broker.channel_stats("q"))


class OnCluster:
    """Lets a case of BrokerTest or ServerTest run on a cluster: the stand-in, or real nodes."""

    def setUp(self):
        self.cluster = RealRqlite.get() if RQLITED else Rqlite()
        self.addCleanup(self.cluster.close)
        self.options = {**getattr(self, "options", {}), "dbfile": self.cluster.url}
        super().setUp()

    def open_store(self, path, max_size):
        return linger.open_store(self.cluster.url)


def on_cluster(case, left_out=(), **counts):
    """The case with a cluster in place of a file, without the tests that are about the file."""
    name = case.__name__.replace("Test", "OnClusterTest")
    changed = {**dict.fromkeys(left_out), **counts}
    return type(name, (OnCluster, case), {"__module__": __name__, **changed})


KeyOnClusterTest = on_cluster(KeyTest)
CallReplyOnClusterTest = on_cluster(CallReplyTest)
GroupOnClusterTest = on_cluster(
    GroupTest, ("test_a_long_group_costs_no_more_than_a_short_one",), STEPS=150
)
ConcurrencyOnClusterTest = on_cluster(
    ConcurrencyTest, ("test_a_usual_take_of_another_channel_runs_the_usual_statements",)
)
ScheduleOnClusterTest = on_cluster(
    ScheduleTest,
    ("test_a_database_that_fails_leaves_the_due_time",),  # its statement fails on SQLite only
)
PatternOnClusterTest = on_cluster(PatternTest)
RetentionOnClusterTest = on_cluster(RetentionTest)
SettingsOnClusterTest = on_cluster(SettingsTest)


class TwoServersTest(OnCluster, BrokerTest):
    """Two servers on one cluster."""

    def setUp(self):
        self.hasten(IDLE_LOOK_INTERVAL=0.05)
        super().setUp()
        self.other = self.open()

    def test_a_call_at_one_is_answered_at_the_other(self):
        call = self.thread(self.broker.calls.call, "q", b"2 + 3")
        message = self.other.get("q", PATIENCE)
        self.other.calls.reply(message.id, b"5")
        self.assertEqual(call.result(PATIENCE)[0], b"5")

    def test_the_limit_of_a_channel_holds_for_both_at_once(self):
        self.broker.post_batch("q", [(b"x", "text/plain", {})] * 3)
        self.other.set_settings("q", max_in_flight=2)
        self.assertEqual(self.broker.get("q").id, 1)  # it may not know of the setting yet
        self.assertEqual(self.other.get("q").id, 2)
        for broker in (self.broker, self.other):
            self.assertEqual(broker.take(broker.consumer(["q"], n=5)), [])
        waiting = self.park("q")
        self.other.delete(1)
        self.assertEqual(waiting.result(PATIENCE).id, 3)

    def test_the_next_of_a_group_comes_whichever_server_the_one_before_was_taken_at(self):
        for n in range(3):
            self.broker.post("q", b"%d" % n, group="a", timeout=5)
        self.assertEqual(self.other.get("q").id, 1)
        waiting = self.park("q")
        self.other.delete(1)
        second = waiting.result(PATIENCE)
        self.clock.now += 5  # its consumer has died
        self.assertEqual((second.id, self.other.get("q", PATIENCE).id), (2, 2))
        with self.assertRaises(linger.Conflict):
            self.broker.delete(2, lease=second.lease)
        self.assertIsNone(self.broker.get("q"))
        self.other.delete(2)
        self.assertEqual(self.broker.get("q", PATIENCE).id, 3)

    def test_messages_that_cannot_be_taken_wake_nobody_again_and_again(self):
        for channel in "qrs":
            self.broker.post(channel, b"x")
        self.broker.set_settings("q", max_in_flight=1)
        self.broker.post("q", b"y")
        self.broker.get("q")
        self.broker.pause("r")
        ready = self.broker._store.read(linger.READY_CHANNELS, names='["q", "r", "s"]')
        self.assertEqual(list(map(list, ready[0])), [["s", 1]])

    def test_a_pattern_is_known_to_the_other_server_too(self):
        self.broker.patterns.subscribe("q", "a.#")
        until(lambda: self.other._state.patterns)
        self.assertEqual(self.other.publish("a.b", b"x")[0], {"q": 1})
        self.other.patterns.unsubscribe("q", "a.#")
        self.assertEqual(self.broker.publish("a.b", b"x")[0], {})

    def test_a_channel_for_which_no_take_runs_any_more_is_forgotten(self):
        for n in range(3):
            future = self.park(f"q{n}")
            self.broker.post(f"q{n}", b"x")
            future.result(PATIENCE)
        self.assertEqual(list(self.broker._state.taking), [])

    def replay(self, broker, since=None):
        listen = functools.partial(
            broker.listen, "topics", "t", NoListener(), linger.MemoryBudget(10**7)
        )
        replay = broker.retention.replay("topics", "t", since, listen)
        self.addCleanup(replay.close)
        return replay

    def test_a_reader_sees_what_both_publish_once_and_in_order(self):
        self.broker.retention.put("t", keep=100)
        until(lambda: self.other._state.retention)
        chance, brokers, seen = random.Random(5), (self.broker, self.other), [0]
        publisher = self.thread(
            lambda: [chance.choice(brokers).publication("t", b"x").id for _ in range(80)]
        )
        while len(seen) <= 80:
            replay = self.replay(random.choice(brokers), str(seen[-1]))
            for _ in range(random.randint(1, 4) if len(seen) < 70 else 99):
                seen += [event.message.id for event in replay.events()]
                if len(seen) > 80:
                    break
            replay.close()
        self.assertEqual(seen, [0, *publisher.result(PATIENCE)])

    def test_a_stream_goes_on_with_what_the_other_server_publishes(self):
        self.broker.retention.put("t", keep=9)
        self.broker.publish("t", b"before")
        until(lambda: self.other._state.retention)

        def read():
            while not (events := replay.events()):
                pass
            return [event.message.body for event in events]

        replay = self.replay(self.broker)
        reading = self.thread(read)
        until(lambda: self.broker._state.live.topics)
        self.other.publish("t", b"1")
        self.assertEqual(reading.result(PATIENCE), [b"1"])
        self.broker.retention.clear("t")
        self.broker.publish("t", b"not kept")
        self.assertEqual(read(), [b"not kept"])

    def test_what_is_kept_by_another_server_can_be_cleared_at_once(self):
        self.broker.retention.put("t", keep=5)
        self.broker.publish("t", b"1")
        self.other.retention.clear("t")
        self.assertEqual(self.broker.retention.kept("t"), [])

    def test_servers_of_a_cluster_post_each_due_time_once_and_stand_in_for_one_another(self):
        self.hasten(SCHEDULE_LOOK=20.0)
        self.other.schedules.post_due()
        self.broker.schedules.put("s", "q", b"x", every=30)
        for n in range(1, 4):
            self.clock.now += 30
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda b: b.schedules.post_due(), (self.broker, self.other)))
            self.assertEqual(self.broker.stats()["current-messages"], n)
        self.broker.close()
        self.clock.now += 30
        self.other.schedules.post_due()
        self.assertEqual(self.other.stats()["current-messages"], 4)


TakingOnClusterTest = on_cluster(TakingTest)


# -- the HTTP server -----------------------------------------------------------------------------


class NoListener:
    """What a reader asks of its client, which is there unless a test says otherwise."""

    def __init__(self):
        self.gone = False
        self.disconnected = []

    def is_disconnected(self):
        return self.gone

    def disconnect(self, only_stuck=False):
        self.disconnected.append(only_stuck)


class FeedTest(BrokerTest):
    """What somebody who listens to a channel or topic learns."""

    def setUp(self):
        super().setUp()
        self.memory = linger.MemoryBudget(100_000_000)
        self.live = self.broker._state.live
        self.reader = self.listen("q")

    def listen(self, name, kind="channels"):
        reader = self.broker.listen(kind, name, NoListener(), self.memory)
        self.addCleanup(reader.close)
        return reader

    def read(self, reader=None):
        """The events that are there."""
        reader = reader or self.reader
        events = []
        while reader.position < reader._feed.end():
            events += reader.events()
        return events

    def seen(self, reader=None):
        """The names and ids of the events that are there."""
        return [(event.name, event.message.id) for event in self.read(reader)]

    def test_the_life_of_a_message_is_seen(self):
        self.broker.post("q", b"hello", "text/x", priority=3)
        message = self.broker.get("q")
        self.broker.delete(message.id, message.lease)
        posted, delivered, deleted = self.read()
        self.assertEqual([e.name for e in (posted, delivered)], ["posted", "delivered"])
        self.assertEqual(
            posted.message[:3] + posted.message[10:12], (1, "q", 3, "text/x", b"hello")
        )
        self.assertEqual(delivered.message, message)
        self.assertEqual((deleted.name, deleted.message), ("deleted", message))

    def test_each_way_to_take_and_delete_is_seen(self):
        for n in range(6):
            self.broker.post("q", b"%d" % n)
        self.read()
        self.broker.get("q", auto=True)
        self.assertEqual(self.seen(), [("delivered", 1), ("deleted", 1)])
        consumer = functools.partial(self.broker.consumer, ["other", "q"])
        self.broker.take(consumer(2))
        self.assertEqual(self.seen(), [("delivered", 2), ("delivered", 3)])
        self.broker.take(consumer(), ack=2)
        self.assertEqual(self.seen(), [("deleted", 2), ("delivered", 4)])
        self.broker.delete_batch([(3, 1), (4, 7), (9, None)])
        self.assertEqual(self.seen(), [("deleted", 3)])
        self.broker.drain("q")
        self.assertEqual(self.seen(), [("deleted", 5), ("deleted", 6), ("deleted", 4)])

    def test_each_way_to_post_is_seen(self):
        self.broker.post_batch("q", [(b"a", "x", {}), (b"b", "x", {})])
        self.broker.post_batch("q", [(b"c", "x", {"unique": "k"}), (b"d", "x", {})])
        self.broker.post("q", b"e", unique="k2", delay=9)
        self.broker.subscribe("q", "news")
        self.broker.subscribe("p", "news")
        self.broker.publish("news", b"f")
        events = self.read()
        self.assertEqual({event.name for event in events}, {"posted"})
        self.assertEqual([event.message.id for event in events], [1, 2, 3, 4, 5, 7])
        self.assertEqual(b"".join(event.message.body for event in events), b"abcdef")
        self.assertEqual((events[4].message.delay, events[5].message.topic), (9, "news"))

    def test_a_waiting_consumer_is_delivered_to_after_the_post(self):
        taken = self.park("q")
        self.broker.post("q", b"x")
        taken.result(PATIENCE)
        self.assertEqual(self.seen(), [("posted", 1), ("delivered", 1)])

    def test_what_is_given_back_or_up_is_seen_and_where_it_goes(self):
        dead = self.listen("dead")
        for n in range(3):
            self.broker.post("q", b"x", dead="dead", deliver=2 - n % 2)
            self.broker.get("q")
        self.read()
        self.broker.release(1, reason="later", delay=5)
        released = self.read()[0]
        self.assertEqual((released.name, released.message.error, released.message.delay),
                         ("released", "later", 5))  # fmt: skip
        self.broker.release(2)
        self.assertEqual(self.seen(), [("released", 2), ("moved", 2)])
        self.broker.reject(3, reason="bad")
        rejected, moved = self.read()
        self.assertEqual((rejected.name, rejected.message.error), ("rejected", "bad"))
        message = moved.message
        self.assertEqual((message.channel, message.dead_from, message.dead_reason, message.error,
                          message.delivered, message.dead_delivered, moved.source),
                         ("dead", "q", "reject", "bad", 0, 1, "q"))  # fmt: skip
        self.assertEqual(message, self.broker.read_message(3)[0])
        self.assertEqual(self.seen(dead), [("moved", 2), ("moved", 3)])
        self.broker.redrive("dead")
        for reader in (dead, self.reader):
            events = self.read(reader)
            self.assertEqual([(e.name, e.message.id, e.source, e.message.channel) for e in events],
                             [("moved", 2, "dead", "q"), ("moved", 3, "dead", "q")])  # fmt: skip
        self.assertEqual(events[1].message, self.broker.read_message(3)[0])
        self.broker.redrive_message(3, "dead")
        (event,) = self.read()
        self.assertEqual((event.name, event.source, event.message.channel), ("moved", "q", "dead"))

    def test_what_ends_in_time_is_seen(self):
        self.broker.post("q", b"1", timeout=1)
        self.broker.post("q", b"2", timeout=1, backoff="9")
        self.broker.post("q", b"3", timeout=1, deliver=1)
        for _ in range(3):
            self.broker.get("q")
        self.broker.post("q", b"4", linger=1)
        self.broker.post("q", b"5", linger=1, dead="dead")
        self.broker.post("q", b"6", delay=1)
        self.read()
        self.clock.now += 2
        self.broker.process_due()
        self.assertCountEqual(self.seen(), [
            ("timed-out", 1), ("timed-out", 2), ("timed-out", 3), ("deleted", 3),
            ("expired", 4), ("deleted", 4), ("expired", 5), ("moved", 5),
        ])  # fmt: skip

    def test_an_undone_delivery_is_released(self):
        for auto in (False, True):
            id = self.broker.post("q", b"x").id
            consumer = self.broker.consumer(["q"], auto=auto)
            messages = self.broker.take(consumer)
            self.read()
            self.broker.undo_take(consumer, messages)
            self.assertEqual(self.seen(), [("released", id)])
            self.broker.drain("q")
            self.read()

    def test_what_changes_nothing_is_not_seen(self):
        self.broker.post("q", b"x", dedup="k")
        self.broker.get("q")
        self.read()
        self.broker.post("q", b"x", dedup="k")
        for call in (self.broker.delete, self.broker.release, self.broker.reject):
            with self.assertRaises(linger.Conflict):
                call(1, lease=9)
        self.broker.set_settings("q", hlm=1)
        for call in (lambda: self.broker.post("q", b"x"),
                     lambda: self.broker.post_batch("q", [(b"x", "x", {})])):  # fmt: skip
            with self.assertRaises(linger.Full):
                call()
        self.broker.get("q")
        self.broker.post("other", b"x")
        self.broker.delete(2)
        self.assertEqual(self.seen(), [])

    def test_a_publication_is_seen_once_and_without_subscribers(self):
        reader = self.listen("news", "topics")
        self.broker.publish("news", b"one", "text/x")
        self.broker.publish("other", b"x")
        for _ in range(2):
            self.broker.publish("news", b"two", dedup="k")
        self.broker.publish_batch("news", [(b"three", "x", {}), (b"four", "x", {})])
        events = self.read(reader)
        self.assertEqual([e.message.body for e in events], [b"one", b"two", b"three", b"four"])
        self.assertEqual((events[0].name, *events[0].message[8:11:2]), ("", "news", "text/x"))

    def test_events_are_seen_once_if_an_operation_beside_is_refused(self):
        with self.stopped_ticker(), busy(self.broker._committer):
            posts = [self.thread(self.broker.post, "q", b"x") for _ in range(2)]
            self.broker._committer.submit(linger.Operation(("select no_column",)))
            until(lambda: len(self.broker._committer._pending) == 3)
        for post in posts:
            post.result(PATIENCE)
        self.assertEqual(sorted(self.seen()), [("posted", 1), ("posted", 2)])

    def test_nothing_is_looked_up_while_nobody_listens_to_a_channel(self):
        self.listen("news", "topics")
        self.reader.close()
        self.assertIsNone(self.broker._committer.observer)
        self.assertEqual(self.live.channels, {})
        self.broker.post("q", b"x")

    def test_nothing_is_looked_up_for_calls_in_other_channels(self):
        prepared = []
        prepare = self.live.prepare
        self.live.prepare = lambda operation: (prepare(operation), prepared.append(operation))
        self.broker.post("other", b"x")
        self.broker.post("other", b"x", unique="k")
        message = self.broker.get("other")
        self.broker.take(self.broker.consumer(["other"]), ack=message.id)
        self.broker.delete(2)
        self.broker.drain("other")
        calls = [each for each in prepared if not isinstance(each, linger.ProcessDue)]  # ticker's
        self.assertGreater(len(calls), 5)
        self.assertEqual([operation for operation in calls if operation.look_ups], [])

    def test_a_bug_in_the_events_stops_no_call(self):
        self.live.prepare = self.live.report = unittest.mock.Mock(side_effect=ZeroDivisionError)
        with unittest.mock.patch.object(linger, "log") as log:
            self.broker.post("q", b"x")
            self.assertTrue(self.broker.get("q"))
        self.assertIn("ZeroDivisionError", log.call_args[0][0])

    def test_every_event_that_is_counted_can_be_seen(self):
        seen = {name for events, _, _ in linger.REPORTED for name in events}
        self.assertEqual(seen | {"delivered"}, set(linger.EVENTS))

    def test_every_statement_that_changes_messages_has_its_events_or_needs_none(self):
        change = re.compile(r"\s*(?:insert into|update|delete from) messages\b")
        changes = {name for name, sql in statements().items() if change.match(sql)}
        seen = {name for name, sql in statements().items() if sql in linger.LOOK_UPS}
        self.assertEqual(changes - seen, {
            "LEASE_NEXT", "LEASE_IF_DELETED", "LEASE_IF_OPEN",  # of takes
            "LEASE_BATCH", "DELETE_BATCH",
            "PUBLISH_MESSAGE", "PUBLISH_MATCHING", "BACKFILL",  # PUBLISHED follows
            "BLOCK_LATER", "TOUCH_MESSAGE", "CHANGE_MESSAGE", "TAKE_OVER_TIMES",
        })  # fmt: skip

    def test_a_body_is_cut_the_more_the_more_messages_change(self):
        self.broker.post("q", b"x" * 100_000)
        self.broker.get("q", auto=True)
        self.assertEqual({(len(e.message.body), e.cut) for e in self.read()}, {(65_537, 65_536)})
        self.broker.post_batch("q", [(b"x" * 2_000, "x", {})] * 17)
        self.broker.take(self.broker.consumer(["q"], 17))
        self.broker.delete_batch([(n, None) for n in range(2, 19)])
        events = self.read()
        self.assertEqual(len(events), 3 * 17)
        self.assertEqual({(len(e.message.body), e.cut) for e in events}, {(1_025, 1_024)})

    # -- readers

    def test_what_all_have_read_is_not_kept(self):
        other = self.listen("q")
        for _ in range(100):
            self.broker.post("q", b"x" * 5_000)
        self.assertGreater(self.memory.used, 500_000)
        self.read()
        self.read(other)
        waits = [self.thread(reader.events) for reader in (self.reader, other)]
        until(lambda: len(self.reader._feed.waiting) == 2)
        self.assertEqual((self.memory.used, self.reader._feed._events), (0, []))
        self.broker.post("q", b"x")
        self.assertEqual([len(wait.result(PATIENCE)) for wait in waits], [1, 1])

    def test_a_reader_far_behind_is_disconnected_and_the_others_go_on(self):
        self.hasten(BEHIND_TIME=1_000)
        other = self.listen("q")
        while self.reader._feed.total < 3_000_000:
            self.broker.post("q", b"x" * 50_000)
            self.read(other)
        self.assertFalse(self.reader.is_slow)  # it had not enough time
        for event in self.reader._feed._events:
            event.time -= linger.BEHIND_TIME
        for _ in range(3):
            self.broker.post("q", b"x" * 50_000)
        self.assertEqual((self.reader.is_slow, other.is_slow), (True, False))
        self.assertEqual(self.reader.listener.disconnected, [False])
        self.assertLess(self.memory.used, 1_000_000)
        with self.assertRaises(ConnectionAbortedError):
            self.reader.events()
        self.assertEqual(self.seen(other)[-1][0], "posted")

    def test_no_reader_keeps_more_than_a_burst(self):
        with unittest.mock.patch.object(linger, "MAX_BURST", 2_000_000):
            while not self.reader.is_slow:
                self.broker.post("q", b"x" * 60_000)
                self.assertLess(self.memory.used, 2_300_000)

    def test_without_memory_readers_are_given_up_and_no_call_fails(self):
        self.memory.limit = 300_000
        self.memory.reserve(1)
        while not self.reader.is_slow:
            self.broker.post("q", b"x" * 60_000)
            self.assertLess(self.memory.used, 600_000)
        self.assertEqual(self.memory.used, 1)

    def test_a_reader_whose_listener_has_gone_ends(self):
        with unittest.mock.patch.object(linger, "LISTENER_CHECK_INTERVAL", 0.01):
            wait = self.thread(self.listen("q").events)  # which wakes the thread
            until(lambda: self.live.channels["q"].waiting)
            (reader,) = self.live.channels["q"].waiting
            reader.listener.gone = True
            self.assertIsInstance(wait.exception(PATIENCE), ConnectionAbortedError)

    def test_a_silent_reader_is_woken_from_time_to_time(self):
        with (
            unittest.mock.patch.object(linger, "LISTENER_CHECK_INTERVAL", 0.01),
            unittest.mock.patch.object(linger, "SILENCE_LIMIT", 0.02),
        ):
            reader = self.listen("q")
            for _ in range(3):
                self.assertEqual(self.thread(reader.events).result(PATIENCE), [])


if RQLITED:
    FeedOnClusterTest = on_cluster(FeedTest)


def receive_all(connection):
    """All that comes until the other side closes or resets the connection."""
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65_536):
            received += data
    return bytes(received)


class ServerTest(Folder):
    """A server in this process, raw bytes in and out."""

    options = types.MappingProxyType({})

    def setUp(self):
        super().setUp()
        self.server = linger.serve(**{"allow_host": "x", **self.options})
        self.addCleanup(self.server.close)
        self.broker = self.server.broker
        self.address = self.server.server_address[:2]

    def allow_messages_of(self, size):
        self.broker.max_message = size

    def connect(self):
        connection = socket.create_connection(self.address, PATIENCE)
        self.addCleanup(connection.close)
        return connection

    def connect_narrowly(self):
        """The only connection; its buffers are small, so that soon nothing can be sent to it."""
        connection = socket.socket()
        self.addCleanup(connection.close)
        connection.settimeout(PATIENCE)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # later TCP stutters
        connection.connect(self.address)
        until(lambda: self.server.connections)
        (served,) = self.server.connections
        served.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return connection

    def talk(self, *pieces, half_close=True):
        """All that the server sends for the bytes sent, until it closes."""
        with self.connect() as connection:
            for piece in pieces:
                connection.sendall(piece)
            if half_close:
                with contextlib.suppress(OSError):  # the server has closed it already
                    connection.shutdown(socket.SHUT_WR)
            return receive_all(connection)

    def statuses(self, *pieces, **options):
        """The statuses of all answers to the bytes sent."""
        return [int(s) for s in re.findall(rb"HTTP/1\.1 ([0-9]+)", self.talk(*pieces, **options))]

    def call(self, method, path, body=None, headers=None):
        """A request as an ordinary client makes it: (status, headers, body)."""
        client = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        with contextlib.closing(client):
            return exchange(client, method, path, body, headers)

    def json(self, method, path, body=None, headers=None):
        status, _, text = self.call(method, path, body, headers)
        return status, json.loads(text) if text else None

    def await_read(self):
        """Waits until the server has received all that was sent on its one connection."""
        until(lambda: self.server.connections)
        (served,) = self.server.connections
        until(lambda: not select.select([served], [], [], 0)[0])

    def park(self, channel="q", query=""):
        """A connection whose GET waits."""
        before = count_waiting(self.broker, channel)
        connection = self.connect()
        connection.sendall(f"GET /channels/{channel}{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        until(lambda: count_waiting(self.broker, channel) > before)
        return connection


class Trickle:
    """A connection from which few bytes come at a time."""

    def __init__(self, connection, most=lambda: 1):
        self._connection = connection
        self._most = most

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def recv(self, _, *flags):
        return self._connection.recv(self._most(), *flags)


def wrapping_connections(wrap):
    """Lets servers see their connections through wrappers."""
    finish_request = linger.Server.finish_request

    def finish_wrapped(server, connection, address):
        finish_request(server, wrap(connection), address)

    return unittest.mock.patch.object(linger.Server, "finish_request", finish_wrapped)


def trickling(most=lambda: 1):
    """Lets servers receive few bytes at a time."""
    return wrapping_connections(lambda connection: Trickle(connection, most))


class HeldBack:
    """A connection that hands over the first bytes only after it was shut down."""

    def __init__(self, connection, arrived):
        self._connection = connection
        self._arrived = arrived
        self._shut = threading.Event()

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def recv(self, size, *flags):
        data = self._connection.recv(size, *flags)
        if flags:
            return data
        self._arrived.set()
        self._shut.wait(PATIENCE)
        return data

    def shutdown(self, how):
        self._connection.shutdown(how)
        self._shut.set()


FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class CallTest(ServerTest):
    """Every call of the API, as an ordinary client sees it."""

    def test_welcome_names_the_server(self):
        status, value = self.json("GET", "/")
        self.assertEqual(status, 200)
        self.assertEqual(list(value), ["Linger", "version", "id", "hostname"])
        self.assertEqual(value["Linger"], "Welcome")

    def test_a_message_goes_in_and_out(self):
        status, headers, body = self.call(
            "POST", "/channels/q?priority=-2&timeout=9&deliver=3&linger=60", b"\0\xff",
            {"Content-Type": "image/x"},
        )  # fmt: skip
        self.assertEqual((status, body), (202, b'{"id":1}\n'))
        self.assertEqual(headers["Content-Type"], "application/json")
        status, headers, body = self.call("GET", "/channels/q")
        self.assertEqual((status, body, headers["Content-Type"]), (200, b"\0\xff", "image/x"))
        self.assertEqual(headers["Cache-Control"], "no-store")
        mine = {name: value for name, value in headers.items() if name.startswith("x-linger-")}
        self.assertEqual(
            mine,
            {
                "x-linger-msg-id": "1", "x-linger-channel": "q", "x-linger-priority": "-2",
                "x-linger-timeout": "9", "x-linger-deliver": "3", "x-linger-delivered": "1",
                "x-linger-received": "0", "x-linger-linger": "60", "x-linger-topic": "",
                "x-linger-lease": "1",
            },
        )  # fmt: skip

    def test_an_empty_channel_is_204_with_its_name_and_no_length(self):
        status, headers, body = self.call("GET", "/channels/q?nowait")
        self.assertEqual((status, body, headers["x-linger-channel"]), (204, b"", "q"))
        self.assertIsNone(headers["Content-Length"])
        self.assertEqual(self.call("GET", "/channels/q?nowait=1")[0], 204)
        self.assertEqual(self.call("GET", "/channels/q?wait=0")[0], 204)

    def test_the_type_is_text_plain_when_none_was_given(self):
        self.talk(b"POST /channels/q HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
        self.assertEqual(self.call("GET", "/channels/q")[1]["Content-Type"], "text/plain")

    def test_a_form_with_msg_is_that_message(self):
        self.call("POST", "/channels/q?priority=1", "msg=+a%00%0D%26b+&priority=5", FORM)
        _, headers, body = self.call("GET", "/channels/q")
        self.assertEqual((body, headers["x-linger-priority"]), (b" a\0\r&b ", "5"))
        self.assertEqual(headers["Content-Type"], "text/plain")

    def test_any_other_body_is_the_message_and_none_of_its_bytes_is_a_parameter(self):
        kept = random.Random(64).randbytes(200_000)
        for body in (
            b"hello", b"msg", b"100% sure & so on", b"a=1&timeout=9", b"rock & roll", b"=", b"&",
            b'{"url":"https://x.example/?id=1&msg=2"}', b"=x&msg=y", b"a b=1&msg=y",
            b"a%20b=&msg=y",
            b'{"url":"https://x.example/?id=1&delay=3600&x=1"}', b"a=1&msg", b"\xff=1&msg=y",
            b'{"a":"https://x.example/?dedup=k&dedup=k&x=1"}', b"a=1" + b"&b=2" * 120,
            b"a+b=1" + b"&b=2" * 120 + b"&msg=1", b"+&msg=y", kept, b"&msg=&timeout=1" + kept,
        ):  # fmt: skip
            with self.subTest(body[:60]):
                self.assertEqual(self.call("POST", "/channels/q", body, FORM)[0], 202)
                _, headers, taken = self.call("GET", "/channels/q?nowait&auto")
                self.assertEqual((taken, headers["Content-Type"]), (body, *FORM.values()))
                self.assertEqual(headers["x-linger-timeout"], "30")

    def test_a_form_with_msg_has_a_bounded_number_of_fields(self):
        form = "msg=x" + "&a=1" * 99
        self.assertEqual(self.call("POST", "/channels/q", form, FORM)[0], 202)
        self.assertEqual(self.call("POST", "/channels/q", form + "&a-b_c.d=1", FORM)[0], 400)

    def test_a_multipart_form_with_msg_is_that_message(self):
        form = (
            b'--B\r\nContent-Disposition: form-data; name="timeout"\r\n\r\n7\r\n'
            b'--B\r\nContent-Disposition: form-data; name="msg"; filename="f"\r\n'
            b"Content-Type: image/x\r\n\r\n \r\n--\xff\0\r\n--B--\r\n"
        )
        self.call(
            "POST", "/channels/q", form, {"Content-Type": 'multipart/form-data; boundary="B"'}
        )
        _, headers, body = self.call("GET", "/channels/q")
        self.assertEqual((body, headers["x-linger-timeout"]), (b" \r\n--\xff\0", "7"))

    def test_a_multipart_body_that_is_not_a_linger_form_is_the_message(self):
        part = b"--B\r\nContent-Disposition: form-data; name=%s\r\n\r\n1\r\n"
        for type, body in (
            ("multipart/form-data", b"--B--"),
            ("multipart/form-data; boundary=B", b"--B\r\nno end"),
            ("multipart/form-data; boundary=B", b"--B\r\n\r\nno name\r\n--B--"),
            ("multipart/form-data; boundary=B", b"--B\r\n" * 200 + b"--B--"),
            ("multipart/form-data; boundary=B", part % b"timeout" + b"--B--"),
            ("multipart/form-data; boundary=B", part % b"msg" + part % b'"a b"' + b"--B--"),
            ("multipart/mixed; boundary=B", part % b"msg" + b"--B--"),
        ):
            with self.subTest(body):
                self.call("POST", "/channels/q", body, {"Content-Type": type})
                _, headers, taken = self.call("GET", "/channels/q?nowait&auto")
                self.assertEqual((taken, headers["Content-Type"]), (body, type))
                self.assertEqual(headers["x-linger-timeout"], "30")

    def test_msg_in_the_query_is_the_message_when_there_is_no_body(self):
        self.call("POST", "/channels/q?msg=a%20b+c")
        self.assertEqual(self.call("GET", "/channels/q")[2], b"a b c")
        self.call("POST", "/channels/q?msg=query", "body", {"Content-Type": "x/y"})
        self.assertEqual(self.call("GET", "/channels/q")[2], b"body")

    def test_bad_parameters_are_400_and_named(self):
        for text in ("1.5", "1e3", "NaN", "9" * 30, "", "%FF", "0x1", "1_0", " 1"):
            for name in ("priority", "timeout", "deliver", "linger"):
                with self.subTest(name=name, text=text):
                    query = f"?{name}={urllib.parse.quote(text, safe='%')}"
                    for path in ("/channels/q", "/channels/q/topics/t"):
                        method = "PUT" if "topics" in path else "POST"
                        body = "x" if method == "POST" else None
                        status, value = self.json(method, path + query, body)
                        self.assertEqual(status, 400)
                        self.assertIn(name, value["error"])
        for query in ("timeout=0", "deliver=-1", "linger=-1"):
            self.assertEqual(self.call("POST", f"/channels/q?{query}", "x")[0], 400)
        self.assertEqual(self.broker.channels(), [])

    def test_where_there_are_only_parameters_they_may_be_a_form_or_a_flat_json_object(self):
        id = self.broker.post("q", b"x").id
        self.broker.get("q")
        form = b"--B\r\nContent-Disposition: form-data; name=timeout\r\n\r\n60\r\n--B--"
        for type, body in (
            (*FORM.values(), "timeout=60&x=1"),
            ("multipart/form-data; boundary=B", form),
            ("application/json", '{"timeout": 60, "x": true, "dead": null}'),
            ("Application/JSON; charset=utf-8", ' {"timeout": "60"}\r\n'),
        ):
            for method, path in (
                ("PUT", "/channels/q/settings"),
                ("PUT", "/channels/q/topics/t"),
                ("POST", f"/messages/{id}/touch"),
            ):
                with self.subTest(type=type, path=path):
                    headers = {"Content-Type": type}
                    path += "?timeout=50"  # the body's wins
                    self.assertEqual(self.call(method, path, body, headers)[0], 204)
        self.assertEqual(self.broker.settings("q")["timeout"], 60)
        headers = {"Content-Type": "application/json"}
        for text, status in (("5", 204), ("true", 400), ("1.5", 400), ("[5]", 415)):
            body = f'{{"for": {text}}}'
            self.assertEqual(self.call("PUT", "/channels/q/pause", body, headers)[0], status, body)

    def test_any_other_body_is_415_there_and_changes_nothing(self):
        self.broker.set_settings("q", timeout=60)
        self.broker.pause("q", 1000)
        id = self.broker.post("q", b"x").id
        self.broker.post("d", b"x")
        for type, body in (
            (*FORM.values(), '{"timeout": 5}'),
            (*FORM.values(), '{"timeout=5"}'),
            (*FORM.values(), "timeout"),
            ("multipart/form-data; boundary=B", "--B\r\nno end"),
            ("application/json", "[1]"),
            ("application/json", '{"timeout": 5'),
            ("application/json", '{"timeout": {"a": 5}}'),
            ("application/json", '{"timeout": [5]}'),
            ("application/json", '{"timeout": 5}, {"deliver": 5}'),
            ("application/json", "\xff"),
            ("application/json", '{"a":' * 10_000),
            ("text/plain", "timeout=5"),
            ("application/json-patch+json", "{}"),
        ):
            for method, path in (
                ("PUT", "/channels/q/settings"),
                ("PUT", "/channels/q/pause"),
                ("PUT", "/channels/q/topics/t"),
                ("POST", "/channels/q/redrive"),
                ("POST", f"/messages/{id}/touch"),
                ("DELETE", f"/messages/{id}"),
            ):
                with self.subTest(body=body[:30], path=path):
                    headers = {"Content-Type": type}
                    status, _, text = self.call(method, path, body.encode("latin-1"), headers)
                    self.assertEqual(status, 415, text)
        self.assertEqual(self.broker.settings("q")["timeout"], 60)
        info = self.broker.info("q")
        self.assertEqual((info["ready"], info["topics"], info["paused"]), (1, [], True))

    def test_the_body_of_a_get_is_a_form_or_is_ignored(self):
        self.broker.post("q", b"x")
        self.assertEqual(self.call("GET", "/channels/q", "auto=1&n=a", FORM)[0], 400)
        for type in ("application/json", *FORM.values()):
            headers = {"Content-Type": type}
            self.assertEqual(self.call("GET", "/channels", '{"info"}', headers)[0], 200)

    def test_chunked_bodies_after_the_same_head_have_nothing_to_do_with_each_other(self):
        def send(head, *bodies):
            head += "\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Type: "
            head += FORM["Content-Type"] + "\r\n\r\n"
            chunks = (f"{len(b):x}\r\n{b}\r\n" if b else "" for b in bodies)
            return self.talk("".join(f"{head}{c}0\r\n\r\n" for c in chunks).encode())

        self.assertIn(b" 400 ", send("POST /channels/q HTTP/1.1", "", "msg=1", "", "msg=2"))
        self.broker.post("q", b"3")
        answers = send("GET /channels/q?nowait HTTP/1.1", "", "n=1", "", "auto=1")
        self.assertEqual(re.findall(rb'(?:"body":"|\r\n\r\n)(\d)', answers), [b"1", b"2", b"3"])
        self.assertEqual(answers.count(b'[{"id":2,'), 1)

    def test_switches_are_on_unless_their_value_is_one_of_four(self):
        for query, on in (
            ("auto", True), ("auto=", True), ("auto=1", True), ("auto=yes", True),
            ("auto=0", False), ("auto=False", False), ("auto=NO", False), ("auto=off", False),
            ("auto=00", True), ("auto=none", True), ("", False),
        ):  # fmt: skip
            with self.subTest(query):
                self.broker.post("q", b"x")
                self.assertEqual(self.call("GET", f"/channels/q?{query}&timeout=60")[0], 200)
                self.assertEqual(self.broker.info("q")["in-flight"], 0 if on else 1)
                self.broker.drain("q")
        self.broker.post("q", b"x" * 2000)
        self.assertEqual(self.json("GET", "/channels?info=off")[1], {"channels": ["q"]})
        self.assertTrue(self.json("GET", "/channels/q/messages?whole=false")[1][0]["cut"])
        connection = self.park("empty", "?nowait=False&wait=60")
        self.broker.post("empty", b"late")
        self.assertTrue(connection.recv(1000).endswith(b"late"))

    def test_a_raw_comma_separates_channels_in_a_get_of_messages_and_nowhere_else(self):
        for method, path in (
            ("POST", "/channels/a,b"), ("DELETE", "/channels/a,b"), ("POST", "/channels/a,b/batch"),
            ("PUT", "/channels/a,b/settings"), ("GET", "/channels/a,b/info"),
            ("PUT", "/channels/a,b/topics/t"), ("GET", "/channels/a,b/stats"),
        ):  # fmt: skip
            status, value = self.json(method, path, "x" if method == "POST" else None)
            self.assertEqual(status, 400, path)
            self.assertIn("%2C", value["error"])
        self.assertEqual(self.call("POST", "/channels/a%2Cb", "x")[0], 202)
        self.assertEqual(self.call("PUT", "/channels/c/topics/a,b")[0], 204)
        self.assertEqual(self.broker.channels(), ["a,b", "c"])

    def test_integers_may_be_signed_and_unknown_parameters_are_ignored(self):
        path = "/channels/q?priority=%2B5&topic=x&nonsense=1"
        self.assertEqual(self.call("POST", path, "x")[0], 202)
        self.assertEqual(self.call("GET", "/channels/q")[1]["x-linger-priority"], "5")

    def test_an_empty_message_is_400_and_a_too_large_one_413(self):
        self.assertEqual(self.call("POST", "/channels/q")[0], 400)
        self.assertEqual(self.call("POST", "/channels/q", "msg=", FORM)[0], 400)
        limit = linger.MAX_MESSAGE
        self.assertEqual(self.call("POST", "/channels/q", b"x" * limit)[0], 202)
        self.assertEqual(self.call("POST", "/channels/q", b"x" * (limit + 1))[0], 413)
        self.assertEqual(self.call("POST", "/channels/q", b"msg=" + b"x" * limit, FORM)[0], 202)
        too_long = b"msg=" + b"x" * (limit + 1)
        self.assertEqual(self.call("POST", "/channels/q", too_long, FORM)[0], 413)

    def test_names_are_percent_encoded_utf_8(self):
        for name in ("a/b", "日本 語", "ü", "%", "a?b#c", "a,b", "."):
            part = urllib.parse.quote(name, safe="")
            with self.subTest(name):
                self.assertEqual(self.call("POST", f"/channels/{part}", "x")[0], 202)
                header = self.call("GET", f"/channels/{part}")[1]["x-linger-channel"]
                visible = re.fullmatch("[!-$&-~]*", name)
                self.assertEqual(header, name if visible else part)
                self.assertIn(name, self.json("GET", "/channels")[1]["channels"])

    def test_bad_names_are_400(self):
        for part in ("%", "%4", "%zz", "%ff", "%C3%28", "a%0Ab", "%7F", "x" * 256, ""):
            with self.subTest(part):
                self.assertEqual(self.call("POST", f"/channels/{part}", "x")[0], 400)
                self.assertEqual(self.call("GET", f"/topics/{part}/channels")[0], 400)
        self.assertEqual(self.broker.channels(), [])

    def test_no_name_or_type_can_inject_a_header(self):
        self.call("PUT", "/channels/q/topics/%E4%BD%A0%20x")
        self.call("POST", "/topics/%E4%BD%A0%20x", "y", {"Content-Type": "text/\xe4"})
        _, headers, _ = self.call("GET", "/channels/q")
        self.assertEqual(headers["x-linger-topic"], "%E4%BD%A0%20x")
        self.assertEqual(headers["Content-Type"], "text/\xe4")

    def test_drain_and_stats(self):
        self.call("POST", "/channels/q", "1")
        self.call("POST", "/channels/q", "2")
        self.call("GET", "/channels/q")
        self.assertEqual(self.call("GET", "/channels/q/stats")[2], b'{"ready":1,"hidden":1}\n')
        self.assertEqual(self.call("DELETE", "/channels/q")[0], 204)
        self.assertEqual(self.json("GET", "/channels/q/stats")[1], {"ready": 0, "hidden": 0})

    def test_subscribe_publish_unsubscribe(self):
        self.assertEqual(self.call("PUT", "/channels/a/topics/t?priority=3")[0], 204)
        self.assertEqual(self.call("PUT", "/channels/b/topics/t", "timeout=8", FORM)[0], 204)
        self.assertEqual(self.json("GET", "/topics"), (200, {"topics": ["t"]}))
        self.assertEqual(self.json("GET", "/channels/a/topics"), (200, {"topics": ["t"]}))
        self.assertEqual(self.json("GET", "/topics/t/channels"), (200, {"channels": ["a", "b"]}))
        self.assertEqual(self.json("POST", "/topics/t", "x"), (202, {"a": 1, "b": 2}))
        self.assertEqual(self.call("GET", "/channels/a")[1]["x-linger-priority"], "3")
        headers = self.call("GET", "/channels/b")[1]
        self.assertEqual((headers["x-linger-timeout"], headers["x-linger-topic"]), ("8", "t"))
        for _ in range(2):
            self.assertEqual(self.call("DELETE", "/channels/a/topics/t")[0], 204)
        self.assertEqual(self.json("POST", "/topics/nobody", "x"), (202, {}))
        self.assertEqual(self.call("POST", "/topics/nobody", "")[0], 400)

    def test_delete_and_touch(self):
        self.call("POST", "/channels/q", "x")
        self.assertEqual(self.call("POST", "/messages/1/touch")[0], 409)
        lease = self.call("GET", "/channels/q")[1]["x-linger-lease"]
        self.assertEqual(self.call("POST", f"/messages/1/touch?lease={lease}")[0], 204)
        self.assertEqual(self.call("POST", "/messages/1/touch")[0], 204)
        self.assertEqual(self.call("DELETE", "/messages/1?lease=77")[0], 409)
        self.assertEqual(self.call("DELETE", f"/messages/1?lease={lease}")[0], 204)
        for method, path in (("DELETE", "/messages/1"), ("POST", "/messages/1/touch")):
            self.assertEqual(self.call(method, path)[0], 404)
            self.assertEqual(self.call(method, path.replace("1", "-1"))[0], 404)
            self.assertEqual(self.call(method, path.replace("1", "x"))[0], 400)

    def test_stats_and_health(self):
        self.assertEqual(self.json("GET", "/stats")[1]["version"], linger.__version__)
        self.assertEqual(self.json("GET", "/health"), (200, {"healthy": True}))

    def test_an_unhealthy_server_says_503(self):
        with unittest.mock.patch.object(
            linger.Store, "check_space", side_effect=linger.Full("full")
        ):
            status, headers, _ = self.call("GET", "/health")
            self.assertEqual((status, headers["Retry-After"]), (503, "1"))
            self.assertEqual(self.call("POST", "/channels/q", "x")[0], 507)

    def test_a_wait_is_0_to_3600_seconds(self):
        for wait in ("-1", "3601", "x", ""):
            self.assertEqual(self.call("GET", f"/channels/q?wait={wait}")[0], 400)

    def test_a_bug_while_a_response_is_sent_closes_the_connection(self):
        with contextlib.redirect_stderr(io.StringIO()) as log:
            with unittest.mock.patch.object(linger.Response, "head", side_effect=KeyError):
                self.assertEqual(self.talk(CANARY, half_close=False), b"")
            until(lambda: not self.server.active and "KeyError" in log.getvalue())
        self.assertEqual(self.call("POST", "/channels/q", b"x")[0], 202)

    def statuses_of_a_bug(self, owner, name, data):
        """What the server answers until it closes the connection, while a function fails."""
        broken = unittest.mock.patch.object(owner, name, side_effect=OSError("a bug"))
        with broken, contextlib.redirect_stderr(io.StringIO()) as log:
            statuses = self.statuses(data, half_close=False)
            until(lambda: not self.server.active)
        self.assertIn("OSError: a bug", log.getvalue())
        return statuses

    def test_an_error_while_a_large_response_is_made_is_500_too(self):
        for _ in range(linger.LARGE_COUNT + 1):
            self.broker.post("q", b"x")
        take = b"GET /channels/q?nowait&n=99" + HOST + b"\r\n"
        self.assertEqual(self.statuses_of_a_bug(linger.Api, "_batch_response", take), [500])

    def test_an_error_while_that_error_is_rendered_leaves_no_request_unanswered(self):
        for _ in range(linger.LARGE_COUNT + 1):
            self.broker.post("q", b"x")
        data = b"GET /channels/q?nowait&n=99" + HOST + b"\r\n" + GET + b"Connection: close\r\n\r\n"
        rendering = unittest.mock.patch.object(
            linger.Connection, "_response_to_error", side_effect=MemoryError
        )
        with rendering, unittest.mock.patch("sys.unraisablehook"):
            broken = unittest.mock.patch.object(linger.Api, "_batch_response", side_effect=KeyError)
            with broken:
                self.assertEqual(self.statuses(data, half_close=False), [500, 200])

    def test_an_error_before_an_operation_is_submitted_keeps_no_connection(self):
        for name, data in (
            ("post_async", CANARY),
            ("take_async", b"GET /channels/q" + HOST + b"\r\n"),
            ("delete_async", b"DELETE /messages/1" + HOST + b"\r\n"),
        ):
            with self.subTest(name):
                self.assertEqual(self.statuses_of_a_bug(linger.Broker, name, data), [500])
        self.assertEqual(self.call("POST", "/channels/q", b"x")[0], 202)

    def test_a_bug_is_500_and_logged_and_the_server_goes_on(self):
        broken = unittest.mock.patch.object(linger.Broker, "topics", side_effect=ZeroDivisionError)
        with broken, contextlib.redirect_stderr(io.StringIO()) as log:
            status, value = self.json("GET", "/topics")
        self.assertEqual(status, 500)
        self.assertNotIn("ZeroDivision", value["error"])
        self.assertIn("ZeroDivisionError", log.getvalue())
        self.assertEqual(self.call("GET", "/topics")[0], 200)


class HistoryCallTest(ServerTest):
    def test_the_totals_of_so_many_seconds_are_served(self):
        self.broker.post("q", b"x")
        pass_time(self.broker, 5)
        self.broker.statistics.sample()
        status, _, body = self.call("GET", "/stats/history?seconds=60")
        self.assertEqual((status, json.loads(body)["posted"]), (200, [1]))
        for seconds in ("0", "3601", "x"):
            self.assertEqual(self.call("GET", f"/stats/history?seconds={seconds}")[0], 400)


class MetricsTest(ServerTest):
    NAMES = ("plain", 'quoted "name"', "back\\slash\\", "größe,{}=", "#<script>")
    options = types.MappingProxyType({"metrics_channels": 5})

    def page(self):
        status, headers, body = self.call("GET", "/metrics")
        self.assertEqual((status, headers["Content-Type"]), (
            200, "text/plain; version=0.0.4; charset=utf-8"))  # fmt: skip
        return body.decode()

    def values(self, name):
        """The values of a metric, by its labels."""
        lines = re.findall(rf"(?m)^{name}(?:{{(.*)}})? ([^ ]+)$", self.page())
        return {labels: float(value) for labels, value in lines}

    def test_messages_and_consumers_are_told_by_channel(self):
        for n in range(3):
            self.broker.post("a", b"x", delay=n // 2)
        for _ in range(2):
            self.broker.post("a", b"x", group="g", delay=1)
        self.broker.get("a")
        self.park("b")
        expected = {"ready": 1, "in_flight": 1, "delayed": 2, "blocked": 1}
        found = self.values("linger_messages")
        for state, count in expected.items():
            self.assertEqual(found[f'channel="a",state="{state}"'], count)
        waiting = self.values("linger_waiting_consumers")
        self.assertEqual(waiting, {'channel=""': 0, 'channel="a"': 0, 'channel="b"': 1})
        posted = self.values("linger_messages_posted_total")
        self.assertEqual(posted, {'channel=""': 0, 'channel="a"': 5, 'channel="b"': 0})

    def test_kept_publications_and_schedules_are_counted(self):
        names = [
            f"linger_{name}" for name in ("kept_publications", "schedules", "schedules_failed")
        ]
        self.assertEqual([*map(self.values, names)], [{}, {"": 0}, {"": 0}])
        for topic in ("a", "b"):
            self.broker.retention.put(topic, keep=3)
        for n in range(5):
            self.broker.publish("a", b"%d" % n)
        self.broker.set_settings("full", hlm=1)
        for channel in ("full", "q"):
            self.broker.post(channel, b"x")
            self.broker.schedules.put(channel, channel, b"x", every=1)
        pass_time(self.broker, 1)
        self.broker.schedules.post_due()
        kept, schedules, failed = map(self.values, names)
        self.assertEqual(kept, {'topic="a"': 3, 'topic="b"': 0})
        self.assertEqual((schedules, failed), ({"": 2}, {"": 1}))

    def test_the_age_of_the_oldest_is_told(self):
        self.broker.post("a", b"x")
        pass_time(self.broker, 100)
        self.broker.post("a", b"x")
        age = self.values("linger_oldest_ready_seconds")['channel="a"']
        self.assertTrue(100 <= age < 100 + PATIENCE, age)

    def test_times_are_in_histograms(self):
        self.broker.post("q", b"x")
        pass_time(self.broker, 10)
        message = self.broker.get("q")
        pass_time(self.broker, 20)
        self.broker.delete(message.id)
        for name, most in (("queue", 15.0), ("flight", 60.0)):
            buckets = self.values(f"linger_{name}_time_seconds_bucket")
            bounds = [labels for labels, count in buckets.items() if count]
            self.assertEqual(bounds[0], f'le="{most}"')
            self.assertEqual(list(buckets.values())[-1], 1)
            self.assertEqual(self.values(f"linger_{name}_time_seconds_count"), {"": 1})
            self.assertLess(self.values(f"linger_{name}_time_seconds_sum")[""], most)

    def test_values_are_counted_by_the_ticker_or_for_a_page(self):
        histogram = linger.Histogram((1, 2, 4))
        for value in (3, 0, 1, 9, 4, 1):
            histogram.observe(value)
        self.assertEqual(histogram.counts, [0, 0, 0, 0])
        for _ in range(2):
            histogram.fold()
            self.assertEqual((histogram.counts, histogram.sum), ([3, 0, 2, 1], 18))
        self.broker.post("q", b"x")
        self.broker.get("q")
        noted = self.broker.statistics.histograms()["linger_queue_time_seconds"]
        self.broker.statistics.sample()
        self.assertEqual(sum(noted.counts), 1)

    def test_a_shared_commit_is_one_of_several_operations(self):
        with busy(self.broker._committer):
            for _ in range(3):
                self.broker.post_async(lambda _: None, "q", b"x")
        self.broker.post("q", b"x")
        sums = self.values("linger_commit_operations_sum"), self.values("linger_commit_seconds_sum")
        count = self.values("linger_commit_operations_count")[""]
        self.assertGreaterEqual(sums[0][""], count + 2)
        self.assertGreater(sums[1][""], 0)

    def test_requests_are_counted_by_route_and_status(self):
        for method in ("GET", "HEAD", "PUT"):
            self.call(method, "/topics")
        for _ in range(2):
            self.call("POST", "/channels/q%20q", b"x")
        self.call("GET", "/channels/q%20q")
        self.call("GET", "/nothing")
        self.talk(b"malformed\r\n\r\n")
        found = self.values("linger_http_requests_total")
        expected = {
            'method="GET",route="/topics",status="200"': 2,
            'method="POST",route="/channels/<channel>",status="202"': 2,
            'method="GET",route="/channels/<channel>",status="200"': 1,
            'method="",route="",status="400"': 1,
            'method="",route="",status="404"': 1,
            'method="",route="",status="405"': 1,
        }
        self.assertEqual(found, expected)

    def test_further_channels_share_a_series_so_the_page_is_bounded(self):
        for n in range(20):
            self.broker.post(f"q{n}", b"x")
        self.park("other")
        for name in ("messages", "oldest_ready_seconds", "waiting_consumers"):
            channels = {labels.split(",")[0] for labels in self.values(f"linger_{name}")}
            self.assertEqual(len(channels), 6, name)
        self.assertEqual(self.values("linger_messages")['channel="",state="ready"'], 15)
        self.assertEqual(self.values("linger_waiting_consumers")['channel=""'], 1)
        self.assertEqual(sum(self.values("linger_messages_posted_total").values()), 20)

    def test_the_page_does_not_wait_for_a_commit(self):
        with busy(self.broker._committer):
            self.assertIn("linger_build_info", self.page())

    def test_head_has_no_body(self):
        status, headers, body = self.call("HEAD", "/metrics")
        self.assertEqual((status, body), (200, b""))
        self.assertGreater(int(headers["Content-Length"]), 1_000)

    def test_a_database_in_memory_has_no_size(self):
        self.assertEqual(self.values("linger_database_bytes"), {})

    def test_hostile_names_are_escaped(self):
        for name in self.NAMES:
            self.broker.post(name, b"x")
        found = self.values("linger_messages_posted_total")
        names = [ast.literal_eval(labels.partition("=")[2]) for labels in found]
        self.assertEqual(names, ["", *self.NAMES])

    @unittest.skipUnless(shutil.which("promtool"), "needs promtool (Debian's prometheus)")
    def test_promtool_finds_nothing(self):
        for name in self.NAMES:
            self.broker.post(name, b"x")
        self.broker.retention.put(self.NAMES[1], keep=1)
        self.check(["check", "metrics"], self.page())
        section = (HERE / "README.md").read_text().partition("### Metrics\n")[2]
        blocks = re.findall(r"(?m)(?:^(?:    .*)?\n)+", section.partition("\n### ")[0])
        config, rules = (textwrap.dedent(block) for block in blocks if block.strip())
        self.folder.joinpath("config").write_text(config)
        self.folder.joinpath("rules").write_text(rules)
        self.check(["check", "rules", str(self.folder / "rules")])
        self.check(["check", "config", "--syntax-only", str(self.folder / "config")])

    def check(self, arguments, text=""):
        done = subprocess.run(
            ["promtool", *arguments], input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=PATIENCE,
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stdout)

    @unittest.skipUnless(shutil.which("prometheus"), "needs prometheus")
    def test_prometheus_scrapes_it(self):
        self.broker.post(self.NAMES[1], b"x")
        config = {"job_name": "linger", "scrape_interval": "1s", "scrape_timeout": "1s",
                  "static_configs": [{"targets": [self.server.url[len("http://"):]]}]}  # fmt: skip
        self.folder.joinpath("config").write_text(json.dumps({"scrape_configs": [config]}))
        log = self.folder / "log"
        with log.open("wb") as file:
            prometheus = subprocess.Popen(
                ["prometheus", f"--config.file={self.folder}/config",
                 f"--storage.tsdb.path={self.folder}/data", "--web.listen-address=127.0.0.1:0"],
                stdout=file, stderr=file,
            )  # fmt: skip
        self.addCleanup(prometheus.wait)
        self.addCleanup(prometheus.terminate)
        listening = re.compile(r'msg="Listening on" address=127\.0\.0\.1:([0-9]+)')
        until(lambda: listening.search(log.read_text()))
        port = int(listening.search(log.read_text())[1])
        query = urllib.parse.quote("linger_messages_posted_total > 0")

        def results():
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as client:
                client.request("GET", f"/api/v1/query?query={query}")
                answer = client.getresponse()  # 503 while it starts
                return answer.status == 200 and json.load(answer)["data"]["result"]

        until(results)
        (found,) = results()
        self.assertEqual((found["metric"]["channel"], found["value"][1]), (self.NAMES[1], "1"))


class OpenApiTest(ServerTest):
    """The description of the API lacks nothing.  (`make test-api` checks what it says.)"""

    def test_each_route_has_an_answer_and_each_parameter_a_meaning(self):
        endpoints = {route.endpoint for route in linger.ROUTES}
        self.assertEqual(endpoints, set(linger.ANSWERS), "see ANSWERS in section OpenAPI")
        used = set()
        for endpoint, names in linger.PARAMETERS_OF.items():
            for name in names:
                with self.subTest("see OTHER_PARAMETERS", endpoint=endpoint, parameter=name):
                    schema, help = linger._describe_parameter(endpoint, name)
                    self.assertTrue(schema and help)
                used |= {name, f"{endpoint} {name}"}
        self.assertEqual(set(linger.OTHER_PARAMETERS) - used, set())
        for endpoint in (*linger.LINKS, *linger.REFUSED):
            self.assertIn(endpoint, endpoints)

    def test_it_is_served_without_a_token_and_describes_each_route(self):
        status, description = self.json("GET", "/openapi.json")
        self.assertEqual((status, description["openapi"]), (200, "3.1.0"))
        found = {
            (method.upper(), path.replace("{", "<").replace("}", ">")): operation
            for path, operations in description["paths"].items()
            for method, operation in operations.items()
        }
        self.assertEqual(set(found), {(route.method, route.path) for route in linger.ROUTES})
        ids = [operation["operationId"] for operation in found.values()]
        self.assertEqual(len(ids), len(set(ids)))
        self.assertEqual(found["GET", "/openapi.json"]["security"], [])
        links = json.dumps(description)
        for name in re.findall('"operationId":"([a-z_]+)"', links):
            self.assertIn(name, ids)
        for name in re.findall('"#/components/schemas/([A-Za-z]+)"', links):
            self.assertIn(name, description["components"]["schemas"])

    def test_parameters_have_their_ranges(self):
        (_, description) = self.json("GET", "/openapi.json")
        take = description["paths"]["/channels/{channel}"]["get"]["parameters"]
        schemas = {parameter["name"]: parameter["schema"] for parameter in take}
        self.assertEqual(schemas["n"], {"type": "integer", "minimum": 1, "maximum": 1_000})
        self.assertEqual(schemas["timeout"]["minimum"], 1)
        for value in ("0", "1001"):
            self.assertEqual(self.call("GET", f"/channels/q?nowait&n={value}")[0], 400)

    def test_all_that_is_told_of_a_channel_is_described(self):
        info = self.json("GET", "/channels/q/info")[1]
        self.assertEqual(set(linger.SCHEMAS["Channel"]["properties"]), set(info))

    def test_the_headers_of_answers_are_those_that_are_sent(self):
        paths = self.json("GET", "/openapi.json")[1]["paths"]

        def described(path, method, status):
            return set(paths[path][method]["responses"][status]["headers"])

        own = {"dead": "failed", "group": "g", "unique": "u", "backoff": "1", "delay": 900}
        self.broker.post("q", b"x", headers={"a": "b"}, **own)
        self.broker.reject(1, reason="out of paper")
        names = {name.lower() for name in self.call("GET", "/messages/1")[1]}
        sent = {name for name in names if name.startswith("x-linger-")} - {"x-linger-h-a"}
        self.assertGreater(len(sent), 15)
        for path in ("/channels/{channel}", "/messages/{id}"):
            self.assertEqual(sent - described(path, "get", "200"), set())
        self.assertEqual(described("/channels/{channel}/call", "post", "200"), set())
        for path in ("/topics/{topic}", "/topics/{topic}/batch"):
            self.assertIn(linger.PUBLICATION_HEADER, described(path, "post", "202"))

    def test_only_streams_that_may_replay_have_since(self):
        paths = self.json("GET", "/openapi.json")[1]["paths"]
        for kind, expected in (("channel", []), ("topic", ["since"]), ("pattern", ["since"])):
            operation = paths[f"/{kind}s/{{{kind}}}/live"]["get"]
            names = [parameter["name"] for parameter in operation["parameters"]]
            self.assertEqual(names, [kind, *expected])
            self.assertEqual(operation["operationId"], f"open_stream_{kind}s")

    def test_every_status_of_an_error_is_described(self):
        statuses = {
            call.args[1].value
            for call in ast.walk(parse(SOURCE))
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "LingerError"
            and len(call.args) > 1 and isinstance(call.args[1], ast.Constant)
        }  # fmt: skip
        self.assertGreater(len(statuses), 5)
        self.assertEqual(statuses - set(linger.ERRORS), set())


class SourceTest(ServerTest):
    def test_the_source_is_served_with_a_tag(self):
        status, headers, body = self.call("GET", "/linger.py")
        self.assertEqual(status, 200)
        self.assertTrue(body == SOURCE.encode())  # a comparison line by line would take an hour
        self.assertEqual(headers["Content-Type"], "text/x-python; charset=utf-8")
        for tags in (headers["ETag"], 'W/"x", W/' + headers["ETag"], "*"):
            answer = self.call("GET", "/linger.py", headers={"If-None-Match": tags})
            self.assertEqual((answer[0], answer[2]), (304, b""))
        self.assertEqual(self.call("GET", "/linger.py", headers={"If-None-Match": '"x"'})[0], 200)

    def test_what_runs_is_served_after_an_edit(self):
        edited = self.folder / "linger.py"
        edited.write_text("edited")
        with unittest.mock.patch.object(linger, "__file__", str(edited)):
            self.assertIn(b"\nclass Server(", self.call("GET", "/linger.py")[2])

    def test_what_does_not_run_is_not_served(self):
        self.addCleanup(linger.own_source.cache_clear)
        edited = self.folder / "linger.py"
        edited.write_text("edited after the program was loaded")
        for path in (edited, self.folder / "gone.py", compiled):
            linger.own_source.cache_clear()
            with unittest.mock.patch.object(linger, "__file__", str(path)):
                self.assertEqual(self.call("GET", "/linger.py")[0], 404, path)


class ConsumerCallTest(ServerTest):
    """The calls of part 2 of the API, over HTTP."""

    def post(self, body="x", query="", channel="q"):
        status, value = self.json(
            "POST", f"/channels/{channel}{query}", body, {"Content-Type": "a/b"}
        )
        self.assertEqual(status, 202)
        return value["id"]

    def test_release_and_reject_and_dead_letters(self):
        id = self.post(query="?dead=d%C3%BC&deliver=2&backoff=0")
        self.call("GET", "/channels/q")
        self.assertEqual(self.call("POST", f"/messages/{id}/release", "why not?\n")[0], 204)
        headers = self.call("GET", "/channels/q")[1]
        self.assertEqual(headers["x-linger-error"], "why%20not%3F%0A")
        self.assertEqual(headers["x-linger-backoff"], "0")
        self.assertIsNone(headers["x-linger-dead-from"])
        self.assertEqual(self.call("POST", f"/messages/{id}/reject?lease=1")[0], 409)
        self.assertEqual(self.call("POST", f"/messages/{id}/reject?lease=2")[0], 204)
        headers = self.call("GET", "/channels/d%C3%BC")[1]
        self.assertEqual(headers["x-linger-dead-from"], "q")
        self.assertEqual(headers["x-linger-dead-reason"], "reject")
        self.assertEqual(headers["x-linger-delivered"], "1")
        self.assertEqual(self.call("POST", f"/messages/{id}/release?delay=0")[0], 204)
        status, value = self.json("POST", "/channels/d%C3%BC/redrive?n=100")
        self.assertEqual((status, value), (200, {"moved": 1}))
        self.assertEqual(self.call("POST", "/messages/99/release")[0], 404)
        self.assertEqual(self.call("POST", "/messages/99/reject")[0], 404)
        self.assertEqual(self.call("POST", f"/messages/{id}/release")[0], 409)

    def test_uncounted_release(self):
        id = self.post()
        self.call("GET", "/channels/q")
        path = f"/messages/{id}/release"
        status, value = self.json("POST", f"{path}?uncounted")
        self.assertEqual((status, "lease" in value["error"]), (400, True))
        self.assertEqual(self.call("POST", f"{path}?uncounted&lease=1", "no memory")[0], 204)
        headers = self.call("GET", "/channels/q")[1]
        self.assertEqual((headers["x-linger-delivered"], headers["x-linger-lease"]), ("1", "2"))
        self.assertEqual(headers["x-linger-error"], "no%20memory")
        self.assertEqual(self.call("POST", f"{path}?uncounted&lease=1")[0], 409)
        self.assertEqual(self.call("POST", f"{path}?uncounted=no")[0], 204)
        self.assertEqual(self.call("GET", "/channels/q")[1]["x-linger-delivered"], "2")

    def test_a_reason_is_text_of_4096_bytes_at_most(self):
        id = self.post()
        self.call("GET", "/channels/q")
        self.assertEqual(self.call("POST", f"/messages/{id}/release", b"x" * 4097)[0], 413)
        self.assertEqual(self.call("POST", f"/messages/{id}/release", b"\xff")[0], 400)
        for body, reason in (("msg=a+b&delay=0", "a b"), ("boom", "boom"), ("delay=9", "delay=9")):
            self.assertEqual(self.call("POST", f"/messages/{id}/release", body, FORM)[0], 204)
            self.assertEqual(self.broker.get("q").error, reason)

    def test_touch_with_a_timeout(self):
        id = self.post()
        self.call("GET", "/channels/q")
        self.assertEqual(self.call("POST", f"/messages/{id}/touch?timeout=100")[0], 204)
        self.assertEqual(self.call("POST", f"/messages/{id}/touch?timeout=0")[0], 400)

    def test_duplicates_are_reported(self):
        for key in ("?dedup=k", "?unique=u"):
            id = self.post(query=key)
            status, value = self.json("POST", f"/channels/q{key}", "x", {"Content-Type": "a/b"})
            self.assertEqual((status, value), (202, {"id": id, "duplicate": True}))
        headers = {"Idempotency-Key": "k"}
        self.assertTrue(self.json("POST", "/channels/q", "x", headers)[1]["duplicate"])
        self.call("PUT", "/channels/q/topics/t")
        first = self.json("POST", "/topics/t", "x", headers)[1]
        self.assertEqual(
            self.json("POST", "/topics/t", "x", headers), (202, {**first, "duplicate": True})
        )

    def test_many_messages_are_a_json_array(self):
        self.post("text ü".encode())
        self.post(b"\xff\0")
        status, messages = self.json("GET", "/channels/q?n=10&timeout=77")
        self.assertEqual(status, 200)
        self.assertEqual(
            messages[0],
            {
                "id": 1, "channel": "q", "priority": 0, "timeout": 77, "deliver": 0,
                "delivered": 1, "received": 0, "linger": 0, "topic": "", "lease": 1,
                "type": "a/b", "body": "text ü",
            },
        )  # fmt: skip
        self.assertEqual((messages[1]["body"], messages[1]["encoding"]), ("/wA=", "base64"))
        self.assertEqual(self.call("GET", "/channels/q?n=10&nowait")[0], 204)
        for n in ("0", "1001", "x"):
            self.assertEqual(self.call("GET", f"/channels/q?n={n}")[0], 400)

    def test_a_large_response_is_not_made_by_the_committer(self):
        threads = []

        def spy(function, message):
            threads.append(threading.get_ident())
            return function(message)

        committer = self.broker._committer._thread.ident
        spies = {
            name: functools.partial(spy, getattr(linger, name))
            for name in ("message_object", "message_json")
        }
        with unittest.mock.patch.multiple(linger, **spies):
            for count, body in ((2, b"x"), (30, b"x"), (2, b"x" * 50_000)):
                for _ in range(count):
                    self.post(body)
                status, messages = self.json("GET", "/channels/q?n=30")
                self.assertEqual((status, len(messages)), (200, count))
        self.assertEqual(set(threads[:2]), {committer})
        self.assertNotIn(committer, threads[2:])

    def test_acknowledge_and_next(self):
        first, second = self.post("1"), self.post("2")
        lease = self.call("GET", "/channels/q")[1]["x-linger-lease"]
        status, _, body = self.call("GET", f"/channels/q?ack={first}&lease={lease}")
        self.assertEqual((status, body), (200, b"2"))
        self.assertEqual(self.call("GET", f"/channels/q?ack={second}&lease=9")[0], 409)
        self.assertEqual(self.call("GET", f"/channels/q?ack={first}")[0], 404)
        self.assertEqual(self.call("GET", f"/channels/q?ack={second}&nowait")[0], 204)
        self.assertEqual(self.json("GET", "/channels/q/stats")[1], {"ready": 0, "hidden": 0})

    def test_auto_is_undone_when_the_response_cannot_be_sent(self):
        self.broker.post("q", b"x")  # not over HTTP: the one handler must be that of the GET
        real = linger.message_headers

        def break_connection(*arguments):
            next(iter(self.server.connections)).shutdown(socket.SHUT_RDWR)
            return real(*arguments)

        with unittest.mock.patch.object(linger, "message_headers", break_connection):
            self.talk(b"GET /channels/q?auto HTTP/1.1\r\nHost: x\r\n\r\n", half_close=False)
        until(lambda: self.broker.channel_stats("q") == {"ready": 1, "hidden": 0})
        status, headers, _ = self.call("GET", "/channels/q?auto")
        self.assertEqual((status, headers["x-linger-delivered"]), (200, "1"))
        self.assertEqual(self.call("GET", "/channels")[2], b'{"channels":[]}\n')

    def test_several_channels_in_one_get(self):
        self.post(channel="b%2C")
        headers = self.call("GET", "/channels/a,b%2C")[1]
        self.assertEqual(headers["x-linger-channel"], "b,")
        connection = self.park("a", ",c")
        self.post("late", channel="c")
        self.assertTrue(connection.recv(1000).endswith(b"late"))

    def test_a_batch_of_lines(self):
        lines = b'{"a":1}\n\n [2] \r\n"3"'
        ndjson = {"Content-Type": "application/x-ndjson"}
        status, value = self.json("POST", "/channels/q/batch?priority=4", lines, ndjson)
        self.assertEqual((status, value), (202, {"ids": [1, 2, 3]}))
        messages = self.json("GET", "/channels/q?n=9")[1]
        self.assertEqual([m["body"] for m in messages], ['{"a":1}', "[2]", '"3"'])
        self.assertEqual({(m["type"], m["priority"]) for m in messages}, {("application/json", 4)})

    def test_a_batch_of_json(self):
        items = [
            {"body": "ü", "priority": -1, "deliver": "2"},
            {"body": "/wA=", "encoding": "base64", "type": "image/x", "dead": "d"},
            {"body": '{[x]}\\"', "nonsense": True},
        ]
        json_type = {"Content-Type": "application/json; charset=utf-8"}
        path = "/channels/q/batch?timeout=9"
        status, value = self.json("POST", path, json.dumps(items), json_type)
        self.assertEqual((status, value), (202, {"ids": [1, 2, 3]}))
        messages = self.json("GET", "/channels/q?n=9")[1]
        self.assertEqual([m["id"] for m in messages], [1, 2, 3])
        self.assertEqual([m["timeout"] for m in messages], [9, 9, 9])
        self.assertEqual([m["deliver"] for m in messages], [2, 0, 0])
        self.assertEqual((messages[1]["type"], messages[1]["body"]), ("image/x", "/wA="))
        self.assertEqual(messages[2]["body"], '{[x]}\\"')

    def test_a_batch_with_a_bad_item_is_400_with_its_index_and_changes_nothing(self):
        json_type = {"Content-Type": "application/json"}
        for item in (
            1, {}, {"body": 1}, {"body": ""}, {"body": "x", "timeout": 0},
            {"body": "x", "timeout": 1.5}, {"body": "x", "priority": True},
            {"body": "x", "type": "a\r\nb"}, {"body": "x", "type": "日"}, {"body": "x", "type": 1},
            {"body": "?", "encoding": "base64"}, {"body": "x", "encoding": "gzip"},
            {"body": "\ud800"}, {"body": "x", "dedup": ""}, {"body": "x", "dead": 5},
            {"body": "x", "delay": 9, "linger": 3},
        ):  # fmt: skip
            with self.subTest(item):
                text = json.dumps([{"body": "good"}, item])
                status, value = self.json("POST", "/channels/q/batch", text, json_type)
                self.assertEqual((status, value["index"]), (400, 1))
        self.assertEqual(self.broker.channels(), [])

    def test_bodies_that_are_no_batch_are_refused(self):
        json_type = {"Content-Type": "application/json"}
        for text in ("", "x", "{}", "[", '[{"body": {"a": 1}}]', "[[1]]", "1", "[1,]", b"\xff",
                     "[" * 100_000, '[{"a":' * 50_000, "[" + "9" * 5000 + "]"):  # fmt: skip
            for path in ("/channels/q/batch", "/topics/t/batch", "/messages/delete"):
                with self.subTest(text[:20]):
                    self.assertEqual(self.call("POST", path, text, json_type)[0], 400)
        many = json.dumps([1] * 1001)
        self.assertEqual(self.call("POST", "/messages/delete", many, json_type)[0], 413)
        ndjson = {"Content-Type": "application/x-ndjson"}
        self.assertEqual(self.call("POST", "/channels/q/batch", b"1\n" * 1001, ndjson)[0], 413)
        self.assertEqual(self.call("POST", "/channels/q/batch", b"\n", ndjson)[0], 400)
        self.assertEqual(self.call("POST", "/channels/q/batch", b"[]", json_type)[0], 400)
        huge = b"x" * 8_000_001
        self.assertEqual(self.call("POST", "/channels/q/batch", huge, json_type)[0], 413)
        self.assertEqual(self.call("POST", "/channels/q/batch", b"x", FORM)[0], 415)
        self.assertEqual(self.broker.channels(), [])

    def test_a_dedup_key_of_a_batch_holds_for_the_whole_batch(self):
        ndjson = {"Content-Type": "application/x-ndjson", "Idempotency-Key": "k\xc3\xbc"}
        for path in ("/channels/q/batch", "/channels/q/batch?dedup=k%C3%BC"):
            for _ in range(2):
                self.assertEqual(self.json("POST", path, b"1\n2", ndjson), (202, {"ids": [1, 2]}))
        ndjson["Idempotency-Key"] = "\xff"
        self.assertEqual(self.call("POST", "/channels/q/batch", b"1", ndjson)[0], 400)

    def test_a_large_batch_costs_neither_time_nor_memory_out_of_proportion(self):
        items = [{"body": 'a\\"{[' * 40_000}] * 30
        json_type = {"Content-Type": "application/json"}
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertEqual(len(linger.parse_array(json.dumps(items).encode())), 30)
        self.assertLess(tracemalloc.get_traced_memory()[1], 100_000_000)
        for text in ("[" + "{}," * 500_000 + "{}]", "[" + "1," * 500_000 + "1]"):
            self.assertEqual(self.call("POST", "/channels/q/batch", text, json_type)[0], 400)

    def test_a_batch_on_a_topic(self):
        self.call("PUT", "/channels/a/topics/t")
        ndjson = {"Content-Type": "application/x-ndjson"}
        self.assertEqual(
            self.json("POST", "/topics/t/batch", b"1\n2", ndjson), (202, {"a": [1, 2]})
        )

    def test_many_deletes_at_once(self):
        for _ in range(3):
            self.post()
        text = '[{"id": 1, "lease": 9}, 2, 77, {"id": 3}]'
        status, value = self.json("POST", "/messages/delete", text)
        self.assertEqual(
            (status, value), (200, {"deleted": [2, 3], "conflict": [1], "missing": [77]})
        )
        self.assertEqual(self.call("POST", "/messages/delete", '[{"id": "x"}]')[0], 400)
        self.assertEqual(self.call("POST", "/messages/1")[0], 405)

    def test_messages_are_listed_without_taking_them(self):
        id = self.post("y" * 1025)
        status, headers, body = self.call("GET", f"/messages/{id}")
        self.assertEqual((status, len(body), headers["x-linger-state"]), (200, 1025, "ready"))
        self.assertEqual(self.call("GET", "/messages/99")[0], 404)
        self.post("ü".encode() * 600, "?delay=60")
        listed = self.json("GET", "/channels/q/messages")[1]
        self.assertEqual([m["state"] for m in listed], ["ready", "delayed"])
        self.assertEqual((listed[0]["body"], listed[0]["cut"]), ("y" * 1024, True))
        self.assertEqual((listed[1]["body"], listed[1]["cut"]), ("ü" * 512, True))
        listed = self.json("GET", "/channels/q/messages?state=delayed&n=1&after=1")[1]
        self.assertEqual([m["id"] for m in listed], [2])
        self.assertEqual(self.call("GET", "/channels/q/messages?state=x")[0], 400)

    def test_settings_pause_and_info(self):
        self.assertEqual(self.json("GET", "/channels/q/settings"), (200, {}))
        path = "/channels/q/settings?timeout=60&dead=d&hlm=9&backoff=1,2"
        self.assertEqual(self.call("PUT", path)[0], 204)
        expected = {"timeout": 60, "dead": "d", "hlm": 9, "backoff": "1,2"}
        self.assertEqual(self.json("GET", "/channels/q/settings"), (200, expected))
        self.assertEqual(self.call("PUT", "/channels/q/pause?for=100")[0], 204)
        self.assertEqual(self.call("PUT", "/channels/q/pause?for=0")[0], 400)
        self.post()
        self.assertEqual(self.call("GET", "/channels/q?nowait")[0], 204)
        info = self.json("GET", "/channels/q/info")[1]
        self.assertEqual((info["paused"], info["ready"], info["settings"]), (True, 1, expected))
        self.assertEqual(self.json("GET", "/channels?info"), (200, {"channels": [info]}))
        for query, status in (("n=1&like=Q&order=oldest", 200), ("n=1001", 400), ("order=x", 400)):
            self.assertEqual(self.call("GET", f"/channels?info&{query}")[0], status)
        _, headers, text = self.call("GET", "/channels?info&n=1&after=q&like=q&order=ready")
        self.assertEqual((json.loads(text), headers["x-linger-ignored"]), ({"channels": []}, None))
        self.assertEqual(self.call("DELETE", "/channels/q/pause")[0], 204)
        self.assertEqual(self.call("GET", "/channels/q")[1]["x-linger-timeout"], "60")
        self.assertEqual(self.call("DELETE", "/channels/q/settings")[0], 204)
        self.assertEqual(self.json("GET", "/channels/q/settings"), (200, {}))


class MarkTest(ServerTest):
    options = types.MappingProxyType({"hlm": 1})

    def test_a_full_channel_is_507_and_left_out_of_a_publication(self):
        for part in ("a", "%C3%BC%2C"):
            self.call("PUT", f"/channels/{part}/topics/t")
            self.assertEqual(self.call("POST", f"/channels/{part}", "x")[0], 202)
            self.assertEqual(self.call("POST", f"/channels/{part}", "x")[0], 507)
        self.call("PUT", "/channels/free/topics/t")
        status, headers, body = self.call("POST", "/topics/t", "x")
        self.assertEqual((status, body), (202, b'{"free":3}\n'))
        self.assertEqual(headers["x-linger-dropped"], "a,%C3%BC%2C")


class HeadTest(ServerTest):
    """The heads of responses: proxies with default buffers take fewer than 4,096 bytes."""

    options = types.MappingProxyType({"cors": "https://a.example", "hlm": 1})
    ORIGIN = b"Origin: https://a.example\r\n"

    def longest(self, n):
        """A name that takes the most bytes in a header."""
        return "ü" * 126 + f"{n:03}"

    def quoted(self, n):
        return urllib.parse.quote(self.longest(n), safe="")

    def head(self, line, extra=b"", body=b""):
        """The head of a response, which is below the limit, and its header fields."""
        request = line.encode() + HOST + self.ORIGIN + extra
        answer = self.talk(request + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        head, _, self.body = answer.partition(b"\r\n\r\n")
        self.assertLess(len(head) + 4, 4096)
        lines = head.decode("latin-1").split("\r\n")
        return int(lines[0][9:12]), dict(line.split(": ", 1) for line in lines[1:])

    def post_worst(self):
        """Puts a dead letter with all that a message can have, as long as it can be."""
        for n in range(4):
            self.broker.set_settings(self.longest(n), hlm=0)
        most = 2**63 - 1
        self.broker.subscribe(
            self.longest(0), self.longest(1), priority=-most, timeout=999999999, deliver=most,
            linger=most, dead=self.longest(2), backoff=",".join(["999999999"] * 32),
        )  # fmt: skip
        self.broker.publish(self.longest(1), b"x" * 200_000, "a/" + "b" * (linger.MAX_TYPE - 2))
        self.broker._committer.run(
            linger.Operation(
                ("update messages set id = :id, lease = 9e17, unique_key = :key",),
                {"id": most, "key": self.longest(3)},
            )
        )
        self.broker.get(self.longest(0))
        self.reason = "ü€🦄" * (linger.MAX_REASON // 9)
        self.broker.reject(most, reason=self.reason)
        return most

    def test_the_head_of_the_worst_message_is_small(self):
        id = self.post_worst()
        unknown = "&".join(f"{'ü' * 8}{n}=1" for n in range(90))
        status, fields = self.head(f"GET /messages/{id}?{unknown}", b"Connection: close\r\n")
        self.assertEqual((status, fields["x-linger-channel"]), (200, self.quoted(2)))
        self.assertEqual(fields["x-linger-ignored-count"], "90")
        self.assertEqual(fields["x-linger-omitted"].split(",")[0], "dead-from")
        status, fields = self.head(f"GET /channels/{self.quoted(2)}?{unknown}")
        self.assertEqual((status, fields["x-linger-topic"]), (200, self.quoted(1)))
        self.assertEqual(self.body, b"x" * 200_000)
        error = urllib.parse.unquote(fields["x-linger-error"], errors="strict")
        self.assertEqual(fields["x-linger-error-cut"], "true")
        self.assertTrue(len(error) > 9 and self.reason.startswith(error), error)
        self.broker.release(id, delay=0)
        fields = self.head(f"GET /channels/{self.quoted(2)}")[1]
        self.assertEqual(fields["x-linger-dead-from"], self.quoted(0))
        self.assertNotIn("x-linger-omitted", fields)

    def test_own_headers_go_out_with_the_longest_names(self):
        own = {f"n{n:02}": "v" * 61 for n in range(linger.MAX_OWN_HEADERS)}
        self.assertEqual(sum(len(n) + len(v) for n, v in own.items()), linger.MAX_OWN_BYTES)
        self.broker.subscribe(self.longest(0), self.longest(1), priority=-(2**63))
        self.broker.publish(self.longest(1), b"x", headers=own)
        fields = self.head(f"GET /channels/{self.quoted(0)}?" + "ü=1&" * 90)[1]
        self.assertEqual({n: fields[f"x-linger-h-{n}"] for n in own}, own)
        self.assertNotIn("x-linger-omitted", fields)

    def test_own_headers_are_the_last_to_be_left_out(self):
        own = {f"n{n:02}": "v" * 61 for n in range(linger.MAX_OWN_HEADERS)}
        with unittest.mock.patch.object(
            linger.Broker, "publish", functools.partialmethod(linger.Broker.publish, headers=own)
        ):
            id = self.post_worst()
        fields = self.head(f"GET /messages/{id}")[1]
        self.assertEqual(fields["x-linger-omitted"][-2:], ",h")
        self.assertIn("x-linger-error", fields)
        taken = self.json("GET", f"/channels/{self.quoted(2)}?n=1")[1][0]
        self.assertEqual(taken["headers"], own)

    def test_the_whole_reason_is_in_json(self):
        id = self.post_worst()
        listed = self.json("GET", f"/channels/{self.quoted(2)}/messages")[1][0]
        self.assertEqual((listed["id"], listed["error"]), (id, self.reason))
        self.assertEqual((listed["dead-from"], listed["dead-delivered"]), (self.longest(0), 1))
        self.assertEqual(listed["unique"], self.longest(3))
        taken = self.json("GET", f"/channels/{self.quoted(2)}?n=1")[1][0]
        self.assertEqual((taken["error"], "error-cut" in taken), (self.reason, False))

    def test_a_reason_that_fits_is_not_cut(self):
        id = self.broker.post("q", b"x").id
        for reason in ("€" * 150, "a%b" * 200):
            self.broker.get("q")
            self.broker.release(id, reason=reason)
            fields = self.head(f"GET /messages/{id}")[1]
            self.assertEqual(urllib.parse.unquote(fields["x-linger-error"]), reason)
            self.assertNotIn("x-linger-error-cut", fields)

    def test_the_client_gets_the_whole_reason_and_marks_one_that_it_reads_cut(self):
        client = linger.Client(self.server.url)
        self.addCleanup(client.close)
        for reason in ("short", "long" * 1000):
            id = self.broker.post("q", b"x").id
            self.broker.get("q")
            self.broker.release(id, reason=reason)
            error = client.read_message(id)[0].error
            self.assertEqual(error[-1], "…" if len(reason) > 100 else "t")
            self.assertTrue(reason.startswith(error.rstrip("…")))
            self.assertEqual(client.get("q", auto=True).error, reason)

    def test_a_reason_is_cut_between_characters(self):
        for text in ("a€🦄ü" * 9, "🦄" * 30, "%" * 50):
            for size in range(130):
                with self.subTest(text, size=size):
                    cut = linger.cut_encoded(text, size)
                    self.assertLessEqual(len(cut), size)
                    self.assertGreater(len(cut), min(size, len(urllib.parse.quote(text))) - 12)
                    self.assertTrue(text.startswith(urllib.parse.unquote(cut, errors="strict")))

    def test_channels_of_a_204_are_named_if_they_fit_and_else_counted(self):
        fields = self.head("GET /channels/a%2Cb,c%25?nowait")[1]
        self.assertEqual(fields["x-linger-channel"], "a%2Cb,c%25")
        many = ",".join(map(self.quoted, range(9)))
        status, fields = self.head(f"GET /channels/{many}?nowait")
        self.assertEqual((status, fields["x-linger-channel-count"]), (204, "9"))
        self.assertNotIn("x-linger-channel", fields)

    def test_dropped_channels_are_named_if_they_fit_and_else_counted(self):
        for n in range(9):
            self.broker.post(self.longest(n), b"full")
            self.broker.subscribe(self.longest(n), "t")
        status, fields = self.head("POST /topics/t", body=b"x")
        self.assertEqual((status, fields["x-linger-dropped-count"]), (202, "9"))
        self.assertNotIn("x-linger-dropped", fields)
        for n in range(3, 9):
            self.broker.unsubscribe(self.longest(n), "t")
        names = self.head("POST /topics/t", body=b"x")[1]["x-linger-dropped"]
        self.assertEqual(names, ",".join(map(self.quoted, range(3))))

    def test_a_long_content_type_is_refused_and_an_old_one_replaced(self):
        name = b"Content-Type: a/"
        fits = name + b"b" * (linger.MAX_TYPE - 2) + b"\r\n"
        self.assertEqual(self.head("POST /channels/q", fits, b"x")[0], 202)
        self.assertEqual(self.head("POST /channels/r", name + b"b" + fits[16:], b"x")[0], 400)
        self.broker.post("old", b"x", "a/" + "b" * 5000)
        fields = self.head("GET /channels/old")[1]
        self.assertEqual(fields["Content-Type"], "application/octet-stream")

    def test_names_in_headers_decode_exactly(self):
        client = linger.Client(self.server.url)
        self.addCleanup(client.close)
        for name in ("a%20b", "%", "100%25", "a b", "ü", "a,b", "+", "%zz"):
            with self.subTest(name):
                client.subscribe(name, name)
                client.publish(name, b"x")
                taken = client.get(name, wait=0)
                self.assertEqual((taken.channel, taken.topic), (name, name))
                client.delete(taken)
                client.post("q", b"x", dead=name, unique=name)
                client.reject(client.get("q", wait=0))
                self.assertEqual(client.get(name, wait=0).dead_from, "q")
                client.drain(name)


class KeepAliveTest(ServerTest):
    options = types.MappingProxyType({"idle_timeout": 20})

    def test_a_response_says_how_long_its_connection_is_kept(self):
        for version in ("1.1", "1.0"):
            for path in ("/topics", "/channels/q?nowait", "/nowhere"):
                request = f"GET {path} HTTP/{version}\r\nHost: x\r\nConnection: keep-alive\r\n\r\n"
                answers = self.talk(request.encode(), CALL)
                self.assertEqual(answers.count(b"HTTP/1.1 "), 2)
                self.assertIn(b"Connection: keep-alive\r\nKeep-Alive: timeout=20\r\n", answers)

    def test_http_1_0_is_closed_unless_it_asks_for_keep_alive(self):
        answer = self.talk(b"GET /topics HTTP/1.0\r\n\r\n" + CALL)
        self.assertEqual(answer.count(b"HTTP/1.1 "), 1)
        self.assertIn(b"Connection: close\r\n", answer)
        self.assertNotIn(b"Keep-Alive:", answer)

    def test_nothing_is_received_after_a_request_that_closes(self):
        head = b"POST /channels/q HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        with self.connect() as client:
            with busy(self.broker._committer):
                client.sendall(head + b"Content-Length: 1\r\n\r\nx")
                until(lambda: self.server.active)
                (connection,) = self.server.active
                until(lambda: connection._slot.is_awaited)
            self.assertIn(b"HTTP/1.1 202 ", client.recv(1_000))


class IgnoredTest(ServerTest):
    """Parameters that an endpoint does not know: ignored, but named."""

    def ignored(self, *request):
        headers = self.call(*request)[1]
        return headers["x-linger-ignored"], headers["x-linger-ignored-count"]

    def test_unknown_parameters_are_named(self):
        for method, path, expected in (
            ("POST", "/channels/q?proirity=9&msg=x&topic=t", "proirity,topic"),
            ("GET", "/channels/q?nowait&delay=1", "delay"),
            ("GET", "/stats?a,b=1&%C3%BC&%0D%0A", "a%2Cb,%C3%BC,%0D%0A"),
            ("GET", "/messages/7?lease=1", "lease"),
            ("GET", "/channels/q?wait=x&y=1", "y"),
            ("GET", "/channels/q?nowait", None),
        ):
            with self.subTest(path):
                self.assertEqual(self.ignored(method, path), (expected, None))

    def test_those_of_a_body_are_named_and_forgotten_with_it(self):
        forms = {"Content-Type": FORM["Content-Type"]}
        client = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        self.addCleanup(client.close)
        for body, expected in (
            ("msg=x&proi=9", "q1,proi"), ("msg=x&dead=d", "q1"), ("proi=9&ms=x", "q1"),
        ):  # fmt: skip
            status, headers, _ = exchange(client, "POST", "/channels/q?q1=1", body, forms)
            self.assertEqual((status, headers["x-linger-ignored"]), (202, expected))
        body, kind = '{"timeout": 5, "x_y": 6}', {"Content-Type": "application/json"}
        self.assertEqual(self.ignored("PUT", "/channels/q/settings", body, kind), ("x_y", None))

    def test_those_of_the_items_of_a_batch_are_named(self):
        kind = {"Content-Type": "application/json"}
        items = '[{"body": "x", "dedup_for": 5, "tpye": "x"}, {"body": "x", "\\ud800": 1}]'
        self.assertEqual(self.ignored("POST", "/channels/q/batch", items, kind), ("tpye,%3F", None))
        items = '[{"body": "x", "priority": 5}]'
        self.assertEqual(self.ignored("POST", "/topics/t/batch", items, kind), ("priority", None))

    def test_many_are_counted(self):
        names = [f"name{n}" for n in range(100)]
        named, count = self.ignored("GET", "/topics?" + "&".join(names))
        self.assertEqual((named.split(",")[:2], count), (["name0", "name1"], "100"))
        self.assertLessEqual(len(named), linger.MAX_IGNORED)
        self.assertEqual(self.ignored("GET", "/topics?" + "z" * 4000), ("", "1"))
        self.assertEqual(self.ignored("GET", "/topics?" + "&".join(["a"] * 101)), (None, None))

    def test_the_table_of_parameters_says_what_the_endpoints_read(self):
        tables = {n for n in vars(linger) if n.endswith("_PARAMETERS")}
        classes = {"ManagementApi", "Api"}
        found = [node for node in parse(SOURCE).body if getattr(node, "name", "") in classes]
        self.assertEqual(len(found), 2)
        methods = {getattr(m, "name", ""): m for kind in found for m in kind.body}
        for name in {route.endpoint for route in linger.ROUTES}:
            nodes = [*ast.walk(methods[name])]
            for helper in ("_take_options", "_listing"):
                if any(getattr(node, "attr", "") == helper for node in nodes):
                    nodes += ast.walk(methods[helper])
            read = set()
            for node in nodes:
                if isinstance(node, ast.Name) and node.id in tables:
                    read |= {p.name for p in getattr(linger, node.id)}
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    if node.func.attr in ("integer", "switch", "parameter"):
                        read.add(node.args[0].value)
                    elif node.func.attr in ("reason", "message"):
                        read.add("msg")
                    if node.func.attr in ("message_parameters", "_parse_batch"):
                        read.add("keep")
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "parse_wait":
                    read.add("wait")
            tables_of = (linger.PARAMETERS_OF, linger.REFUSED)
            known = {n for table in tables_of for n in table.get(name, ())}
            self.assertEqual(known, read, name)


# Requests as bytes, and what they get: the statuses of all answers, how the last error begins, and
# by name the requests.  What follows must be left alone if the connection is closed, else served.

HOST = b" HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /topics" + HOST
POST = b"POST /channels/q" + HOST
LENGTH = POST + b"Content-Length: "
CODING = POST + b"Transfer-Encoding: "
CHUNKED = CODING + b"chunked\r\n\r\n"
CALL = GET + b"\r\n"
CANARY = b"POST /channels/canary" + HOST + b"Content-Length: 1\r\n\r\nx"
FOLLOW_UP = b"GET /topics/tag/channels" + HOST + b"\r\n"
SMUGGLED = b"POST /channels/smuggled" + HOST + b"Content-Length: 1\r\n\r\nx"

# fmt: off
REFUSED = (
    (
        "400", "",  # with one sentence or another: it depends on how much of it has come
        {
            "LF for CR LF": b"GET / HTTP/1.1\nHost: x\n\n",
            "LF in a header": GET + b"A: b\nContent-Length: 9\r\n\r\n",
            "LF after the blank line": b"\r\n\n\r" + CALL,
            "LF before a request": b"\n" + CALL,
        },
    ),
    (
        "400", "a header must be",
        {
            "CR in a header hides a Content-Length": GET + b"A: b\rContent-Length: 9\r\n\r\n",
            "CR before CR LF": GET + b"A: b\r\r\n\r\n",
            "CR in a name": GET + b"A\rB: c\r\n\r\n",
            "NUL in a value": GET + b"A: b\0c\r\n\r\n",
            "NUL in a name": GET + b"A\0: b\r\n\r\n",
            "control in a value": GET + b"A: b\x01\r\n\r\n",
            "escape in a value": GET + b"A: \x1b[31m\r\n\r\n",
            "DEL in a value": GET + b"A: \x7f\r\n\r\n",
            "form feed in a value": GET + b"A: \x0cb\r\n\r\n",
            "blank before the colon": GET + b"A : b\r\n\r\n",
            "tab before the colon": GET + b"A\t: b\r\n\r\n",
            "blank in a name": GET + b"A B: c\r\n\r\n",
            "folded with a blank": GET + b"A: b\r\n folded\r\n\r\n",
            "folded with a tab": GET + b"A: b\r\n\tfolded\r\n\r\n",
            "blank before the first header": b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
            "no colon": GET + b"no colon\r\n\r\n",
            "no name": GET + b": no name\r\n\r\n",
            "brackets in a name": GET + b"(A): b\r\n\r\n",
            "quotes in a name": GET + b'"A": b\r\n\r\n',
            "name that is not ASCII": GET + b"\xc3\x84: b\r\n\r\n",
            "blank before the colon of a coding": POST + b"Transfer-Encoding : chunked\r\n\r\n",
            "folded coding": CODING + b"\r\n chunked\r\n\r\n",
            "vertical tab before a coding": CODING + b"\x0bchunked\r\n\r\n0\r\n\r\n",
            "vertical tab before a length": LENGTH + b"\x0b5\r\n\r\nhello",
        },
    ),
    (
        "400", "malformed request line: ",
        {
            "HTTP/0.9": b"GET /\r\n\r\n",
            "no target": b"GET HTTP/1.1\r\nHost: x\r\n\r\n",
            "no method": b" / HTTP/1.1\r\nHost: x\r\n\r\n",
            "blank before the method": b" GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            "two blanks": b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
            "blank at the end": b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n",
            "blank in the target": b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
            "tabs": b"GET\t/\tHTTP/1.1\r\nHost: x\r\n\r\n",
            "NUL in the target": b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
            "DEL in the target": b"GET /\x7f HTTP/1.1\r\nHost: x\r\n\r\n",
            "CR in the target": b"GET /\r HTTP/1.1\r\nHost: x\r\n\r\n",
            "CR for CR LF": b"GET / HTTP/1.1\rHost: x\r\n\r\n",
            "brackets in the method": b"G(T / HTTP/1.1\r\nHost: x\r\n\r\n",
            "method that is not ASCII": b"G\xcbT / HTTP/1.1\r\nHost: x\r\n\r\n",
            "version in lower case": b"GET / http/1.1\r\nHost: x\r\n\r\n",
            "version without a point": b"GET / HTTP/11\r\nHost: x\r\n\r\n",
            "version without a minor": b"GET / HTTP/1\r\nHost: x\r\n\r\n",
            "version with two digits": b"GET / HTTP/1.10\r\nHost: x\r\n\r\n",
            "version with a zero before": b"GET / HTTP/01.1\r\nHost: x\r\n\r\n",
            "version with three numbers": b"GET / HTTP/1.1.1\r\nHost: x\r\n\r\n",
            "version in Arabic digits": "GET / HTTP/\u0661.\u0661\r\n\r\n".encode(),
            "another protocol": b"GET / ICY/1.1\r\nHost: x\r\n\r\n",
            "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20) + b"\r\n\r\n",
            "JSON": b'{"a": "b"}\r\n\r\n',
            "an answer": b"HTTP/1.1 200 OK\r\n\r\n",
        },
    ),
    (
        "505", "this server speaks HTTP/1.1",
        {
            "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
            "HTTP/3.0": b"GET / HTTP/3.0\r\nHost: x\r\n\r\n",
            "HTTP/0.9 by name": b"GET / HTTP/0.9\r\nHost: x\r\n\r\n",
        },
    ),
    (
        "400", "the target must be",
        {
            "asterisk for GET": b"GET *" + HOST + b"\r\n",
            "no slash": b"GET topics" + HOST + b"\r\n",
            "query only": b"GET ?a=1" + HOST + b"\r\n",
            "another scheme": b"GET ftp://x/" + HOST + b"\r\n",
            "file": b"GET file:///etc/passwd" + HOST + b"\r\n",
            "one slash": b"GET http:/x" + HOST + b"\r\n",
            "no authority": b"GET http://" + HOST + b"\r\n",
            "userinfo": b"GET http://a@b/" + HOST + b"\r\n",
            "bad port": b"GET http://x:port/" + HOST + b"\r\n",
            "open bracket": b"GET http://[::1/" + HOST + b"\r\n",
            "fragment": b"GET /#x" + HOST + b"\r\n",
            "fragment in a URL": b"GET http://x/#y" + HOST + b"\r\n",
            "CONNECT": b"CONNECT x:80" + HOST + b"\r\n",
        },
    ),
    (
        "414", "the target is too long",
        {
            "long target": b"GET /" + b"x" * 17_000 + HOST + b"\r\n",
            "endless target": b"GET /" + b"x" * 100_000,
            "endless method": b"x" * 100_000,
        },
    ),
    (
        "400", "a request needs a Host",
        {"no Host": b"GET / HTTP/1.1\r\n\r\n"},
    ),
    (
        "400", "the Host header must be",
        {
            "empty Host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
            "blank in Host": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
            "path in Host": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
            "userinfo in Host": b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
            "port in letters": b"GET / HTTP/1.1\r\nHost: x:port\r\n\r\n",
            "long port": b"GET / HTTP/1.1\r\nHost: x:123456\r\n\r\n",
            "two hosts in one": b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
            "open bracket in Host": b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
            "Host that is not ASCII": b"GET / HTTP/1.1\r\nHost: \xc3\xa4\r\n\r\n",
        },
    ),
    (
        "400", "there may be only one",
        {
            "two Hosts": GET + b"Host: x\r\n\r\n",
            "two different Hosts": GET + b"hOST: y\r\n\r\n",
            "two Hosts in HTTP/1.0": b"GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n",
            "two lengths": LENGTH + b"5\r\nContent-Length: 5\r\n\r\nhello",
            "two different lengths": LENGTH + b"5\r\ncontent-length: 6\r\n\r\nhello",
            "two codings": CODING + b"chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "two different codings": CODING + b"chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
            "two types": LENGTH + b"1\r\nContent-Type: a/b\r\nContent-Type: c/d\r\n\r\nx",
        },
    ),
    (
        "431", "",
        {
            "long header": GET + b"A: " + b"x" * 9_000 + b"\r\n\r\n",
            "long name": GET + b"A" * 9_000 + b": x\r\n\r\n",
            "many headers": GET + b"A: b\r\n" * 200 + b"\r\n",
            "endless headers": GET + b"A: b\r\n" * 20_000,
            "endless header": GET + b"A: " + b"x" * 100_000,
        },
    ),
    (
        "400", "Content-Length must be",
        {
            "length in a list": LENGTH + b"5, 5\r\n\r\nhello",
            "length with a plus": LENGTH + b"+5\r\n\r\nhello",
            "length with a minus": LENGTH + b"-5\r\n\r\nhello",
            "length with an underscore": LENGTH + b"0_5\r\n\r\nhello",
            "length in hexadecimal": LENGTH + b"0x5\r\n\r\nhello",
            "length with a fraction": LENGTH + b"5.0\r\n\r\nhello",
            "length with an exponent": LENGTH + b"5e0\r\n\r\nhello",
            "length with a parameter": LENGTH + b"5;a\r\n\r\nhello",
            "length of two numbers": LENGTH + b"5 5\r\n\r\nhello",
            "length with a hard blank": LENGTH + b"5\xa0\r\n\r\nhello",
            "length with a next line": LENGTH + b"5\x85\r\n\r\nhello",
            "length of a small digit": LENGTH + b"\xb2\r\n\r\nhello",
            "length in Arabic digits": LENGTH + "\u0665\r\n\r\nhello".encode(),
            "length in quotes": LENGTH + b'"5"\r\n\r\nhello',
            "no length": LENGTH + b"\r\n\r\nhello",
        },
    ),
    (
        "413", "",
        {
            "a terabyte": LENGTH + b"1000000000000\r\n\r\n",
            "a byte too many": LENGTH + b"256001\r\n\r\n",
            "2^63": LENGTH + b"9223372036854775808\r\n\r\n",
            "2^64 + 5": LENGTH + b"18446744073709551621\r\n\r\nhello",
            "thirty digits": LENGTH + b"9" * 30 + b"\r\n\r\n",
            "large chunk": CHUNKED + b"ffffffff\r\n",
            "chunk of 2^59": CHUNKED + b"800000000000000\r\n",
            "many chunks": CHUNKED + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n",
            "chunks too large together": CHUNKED + b"10000\r\n%s\r\n" % (b"x" * 65_536) * 4,
        },
    ),
    (
        "400", "a request has either",
        {
            "length and coding": LENGTH + b"5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "coding and length": CODING + b"chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            "coding and no length": CODING + b"chunked\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
            "unknown coding and length": CODING + b"x\r\nContent-Length: 5\r\n\r\nhello",
        },
    ),
    (
        "400", "the only transfer coding",
        {
            "gzip, chunked": CODING + b"gzip, chunked\r\n\r\n0\r\n\r\n",
            "chunked, gzip": CODING + b"chunked, gzip\r\n\r\n0\r\n\r\n",
            "chunked, identity": CODING + b"chunked, identity\r\n\r\n0\r\n\r\n",
            "chunked, chunked": CODING + b"chunked, chunked\r\n\r\n0\r\n\r\n",
            "chunked and a comma": CODING + b"chunked,\r\n\r\n0\r\n\r\n",
            "chunked with a parameter": CODING + b"chunked;a=b\r\n\r\n0\r\n\r\n",
            "chunked in quotes": CODING + b'"chunked"\r\n\r\n0\r\n\r\n',
            "xchunked": CODING + b"xchunked\r\n\r\n0\r\n\r\n",
            "chunked with a hard blank": CODING + b"chunked\xa0\r\n\r\n0\r\n\r\n",
        },
    ),
    (
        "501", "the only transfer coding",
        {
            "gzip": CODING + b"gzip\r\n\r\n",
            "identity": CODING + b"identity\r\n\r\n",
            "no coding": CODING + b"\r\n\r\n0\r\n\r\n",
            "chunk": CODING + b"chunk\r\n\r\n0\r\n\r\n",
        },
    ),
    (
        "400", "HTTP/1.0 has no Transfer-Encoding",
        {
            "coding in HTTP/1.0": CHUNKED.replace(b"/1.1", b"/1.0") + b"0\r\n\r\n",
            "coding in HTTP/1.0 kept alive": b"POST /channels/q HTTP/1.0\r\nHost: x\r\n"
            b"Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        },
    ),
    (
        "415", "send the body without",
        {"gzipped body": POST + b"Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx"},
    ),
    (
        "417", "the only expectation",
        {
            "expectation": POST + b"Expect: a-miracle\r\nContent-Length: 1\r\n\r\nx",
            "two expectations": POST + b"Expect: 100-continue, x\r\nContent-Length: 1\r\n\r\nx",
        },
    ),
    (
        "400", "a chunk must start with",
        {
            "no chunk size": CHUNKED + b"\r\n",
            "no chunk size but an extension": CHUNKED + b";a=b\r\n\r\n",
            "chunk size in letters": CHUNKED + b"x\r\n",
            "chunk size with 0x": CHUNKED + b"0x1\r\nx\r\n0\r\n\r\n",
            "chunk size with a plus": CHUNKED + b"+1\r\nx\r\n0\r\n\r\n",
            "chunk size with a minus": CHUNKED + b"-1\r\nx\r\n0\r\n\r\n",
            "chunk size with an underscore": CHUNKED + b"1_0\r\n" + b"x" * 16 + b"\r\n0\r\n\r\n",
            "chunk size after a blank": CHUNKED + b" 1\r\nx\r\n0\r\n\r\n",
            "chunk size after a line feed": CHUNKED + b"\n1\r\nx\r\n0\r\n\r\n",
            "chunk size with a hard blank": CHUNKED + b"1\xa0\r\nx\r\n0\r\n\r\n",
            "chunk size with a vertical tab": CHUNKED + b"1\x0b\r\nx\r\n0\r\n\r\n",
            "chunk size in Arabic digits": CHUNKED + "\u0661\r\nx\r\n0\r\n\r\n".encode(),
            "two chunk sizes": CHUNKED + b"1 1\r\nx\r\n0\r\n\r\n",
            "chunk size of twenty digits": CHUNKED + b"f" * 20 + b"\r\nx\r\n0\r\n\r\n",
            "chunk size of 2^64": CHUNKED + b"10000000000000000\r\n0\r\n\r\n",
            "last chunk of many zeros": CHUNKED + b"0" * 20 + b"\r\n\r\n",
            "chunk lines that end in LF": CHUNKED + b"1\nx\n0\n\n" + b"\r\n",
            "chunk line that ends in CR": CHUNKED + b"1\rx\r\n0\r\n\r\n",
            "LF in an extension": CHUNKED + b"1;a\nb\r\nx\r\n0\r\n\r\n",
            "CR in an extension": CHUNKED + b"1;a\rb\r\nx\r\n0\r\n\r\n",
            "NUL in an extension": CHUNKED + b"1;a\0\r\nx\r\n0\r\n\r\n",
        },
    ),
    (
        "400", "a chunk must end",
        {
            "chunk longer than announced": CHUNKED + b"1\r\nxy\r\n0\r\n\r\n",
            "chunk shorter than announced": CHUNKED + b"3\r\nx\r\n0\r\n\r\n",
            "chunk that ends in LF": CHUNKED + b"1\r\nx\n\n0\r\n\r\n",
            "chunk that ends in CR": CHUNKED + b"1\r\nx\r\r0\r\n\r\n",
            "chunk that ends in anything": CHUNKED + b"1\r\nxXX0\r\n\r\n",
            "chunks without line ends": CHUNKED + b"1\r\nx0\r\n\r\n",
        },
    ),
    (
        "400", "a line of a chunked body",
        {
            "long extension": CHUNKED + b"1;" + b"x" * 300 + b"\r\nx\r\n0\r\n\r\n",
            "endless extension": CHUNKED + b"1;" + b"x" * 100_000,
            "long trailer line": CHUNKED + b"0\r\nA: " + b"x" * 9_000 + b"\r\n\r\n",
        },
    ),
    (
        "400", "trailers must be",
        {
            "bad trailer": CHUNKED + b"0\r\nbad trailer\r\n\r\n",
            "folded trailer": CHUNKED + b"0\r\nA: b\r\n c\r\n\r\n",
            "LF in a trailer": CHUNKED + b"0\r\nA: b\nC: d\r\n\r\n",
            "NUL in a trailer": CHUNKED + b"0\r\nA: \0\r\n\r\n",
            "no end of trailers": CHUNKED + b"0\r\n",
            "many trailers": CHUNKED + b"0\r\n" + b"A: b\r\n" * 2_000 + b"\r\n",
        },
    ),
    ("200 400", "a header must", {"bad after good": CALL + GET + b"A : b\r\n\r\n"}),
    ("202 404 413", "", {"large after error": CANARY.replace(b"canary", b"q") + b"GET /no" + HOST
                         + b"\r\n" + LENGTH + b"999999\r\n\r\n" + SMUGGLED}),
    ("200 400", "a request has either", {"smuggling after good": CALL + LENGTH
                                         + b"3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"}),
)

CLOSED = (
    (
        "200", "",
        {
            "HTTP/1.0": b"GET /topics HTTP/1.0\r\n\r\n",
            "HTTP/1.0 kept alive and closed": b"GET /topics HTTP/1.0\r\n"
            b"Connection: keep-alive, close\r\n\r\n",
            "close": GET + b"Connection: close\r\n\r\n",
            "CLOSE in a list": GET + b"Connection: x,\tCLOSE\r\n\r\n",
            "close in a second header": GET + b"Connection: x\r\nConnection: close\r\n\r\n",
            "close and keep-alive": GET + b"Connection: keep-alive, close\r\n\r\n",
            "close with a body": GET + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
        },
    ),
    ("202", "", {
        "HTTP/1.0 with a body": b"POST /channels/q HTTP/1.0\r\nContent-Length: 1\r\n\r\nx"}),
    ("404", "", {"error in HTTP/1.0": b"GET /no HTTP/1.0\r\n\r\n"}),
    ("200 200", "", {"close in the second": CALL + GET + b"Connection: close\r\n\r\n"}),
)

SERVED = (
    (
        "200", "",
        {
            "plain": CALL,
            "empty lines before": b"\r\n\r\n" + CALL,
            "URL": b"GET http://x/topics" + HOST + b"\r\n",
            "URL of another scheme and case": b"GET HTTPS://X:1/topics" + HOST + b"\r\n",
            "URL with a query and no path": b"GET http://x?a=1" + HOST + b"\r\n",
            "URL of an IPv6 address": b"GET http://[::1]:80/topics" + HOST + b"\r\n",
            "HTTP/1.2": b"GET /topics HTTP/1.2\r\nHost: x\r\n\r\n",
            "Host with a port": b"GET /topics HTTP/1.1\r\nHost: x:80\r\n\r\n",
            "Host of an IPv6 address": b"GET /topics HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
            "blanks around values": b"GET /topics HTTP/1.1\r\nHOST:x\r\nA:\r\nB: \t x\xff \r\n\r\n",
            "hard blanks in a value": GET + b"A: \xa0\x85\r\n\r\n",
            "connection that is not close": GET + b"Connection: closed, keep-alive\r\n\r\n",
            "HTTP/1.0 kept alive": b"GET /topics HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
            "HTTP/1.0 kept alive with a body": b"GET /topics HTTP/1.0\r\n"
            b"Connection: x, keep-alive\r\nContent-Length: 5\r\n\r\nhello",
            "upgrade": GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
            "HEAD": b"HEAD /topics" + HOST + b"\r\n",
            "GET with a body": GET + b"Content-Length: 5\r\n\r\nhello",
            "GET with chunks": GET + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
            "length of zero": GET + b"Content-Length: 0\r\n\r\n",
            "length under another name": GET + b"Content_Length: 999\r\n\r\n",
            "a request as a body": GET + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
            "199 headers": GET + b"A: b\r\n" * 199 + b"\r\n",
            "long header": GET + b"A: " + b"x" * 8_000 + b"\r\n\r\n",
            "dots and slashes in a name": b"GET /channels/..%2f..%2fetc%2fpasswd/stats" + HOST
            + b"\r\n",
        },
    ),
    ("200 " * 20, "", {"a pipeline": CALL * 20}),
    ("200 404 200", "there is no such path", {"an error in a pipeline": CALL + b"GET /no" + HOST
                                              + b"\r\n" + CALL}),
    ("204", "", {"OPTIONS *": b"OPTIONS *" + HOST + b"\r\n",
                 "OPTIONS": b"OPTIONS /topics" + HOST + b"\r\n"}),
    (
        "202", "",
        {
            "a message": LENGTH + b"5\r\n\r\nhello",
            "length with zeros before": LENGTH + b"0005\r\n\r\nhello",
            "length between blanks": LENGTH + b"\t 5 \r\n\r\nhello",
            "chunks": CHUNKED + b"5\r\nhello\r\n0\r\n\r\n",
            "chunk sizes in any form": CHUNKED + b"00000000000000A\t\r\n0123456789\r\n000\r\n\r\n",
            "CHUNKED": CODING + b"\tcHuNkEd \r\n\r\n1\r\nx\r\n0\r\n\r\n",
            "chunk extensions": CHUNKED + b'1;a;b=c;d="\xff;" \t;\r\nx\r\n0;e\r\n\r\n',
            "trailers": CHUNKED + b"1\r\nx\r\n0\r\nContent-Length: 99\r\nA:\r\n\r\n",
            "a request as a message": LENGTH + b"%d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
            "a request as a chunk": CHUNKED + b"%x\r\n" % len(SMUGGLED) + SMUGGLED
            + b"\r\n0\r\n\r\n",
            "identity": POST + b"Content-Encoding: identity\r\nContent-Length: 1\r\n\r\nx",
            "coding under another name": POST + b"Transfer_Encoding: chunked\r\n"
            b"Content-Length: 1\r\n\r\nx",
        },
    ),
    (
        "404", "there is no such path",
        {
            "nowhere": b"GET /nowhere" + HOST + b"Content-Length: 2\r\n\r\nhi",
            "below a channel": b"GET /channels/x/y" + HOST + b"\r\n",
            "two slashes": b"GET //topics" + HOST + b"\r\n",
            "dots": b"GET /../../etc/passwd" + HOST + b"\r\n",
            "long target": b"GET /" + b"x" * 16_000 + HOST + b"\r\n",
        },
    ),
    ("404", "there is no message 999", {"no message": b"DELETE /messages/999" + HOST + b"\r\n"}),
    ("405", "this path allows", {"PUT": b"PUT /topics" + HOST + b"Content-Length: 2\r\n\r\nhi",
                                "slash at the end": b"GET /topics/" + HOST + b"\r\n",
                                "PATCH": b"PATCH /topics" + HOST + b"\r\n",
                                "TRACE": b"TRACE /topics" + HOST + b"\r\n"}),
    ("405", "", {"HEAD of what takes": b"HEAD /channels/q" + HOST + b"\r\n"}),
    (
        "501", "unknown method: ",
        {
            "unknown method": b"BREW /topics" + HOST + b"Content-Length: 2\r\n\r\nhi",
            "method in lower case": b"get /topics" + HOST + b"\r\n",
            "long method": b"G" * 9_000 + b" /topics" + HOST + b"\r\n",
        },
    ),
    (
        "400", "a % in the path",
        {
            "bad percent-encoding": b"POST /channels/%zz" + HOST + b"Content-Length: 1\r\n\r\nx",
            "half a percent-encoding": b"POST /channels/x%2" + HOST + b"Content-Length: 1\r\n\r\nx",
            "percent-encoding with a sign": b"POST /channels/%+1" + HOST + b"\r\n",
        },
    ),
    (
        "400", "the path must be UTF-8",
        {
            "bad UTF-8": b"GET /channels/%ff/stats" + HOST + b"\r\n",
            "overlong UTF-8": b"GET /channels/%c0%af/stats" + HOST + b"\r\n",
            "surrogate": b"GET /channels/%ed%a0%80/stats" + HOST + b"\r\n",
            "raw bytes": b"GET /channels/\xff/stats" + HOST + b"\r\n",
        },
    ),
    (
        "400", "a channel's name must",
        {
            "line break in a name": b"GET /channels/a%0d%0ab/stats" + HOST + b"\r\n",
            "NUL in a name": b"GET /channels/%00/stats" + HOST + b"\r\n",
            "control in a name": b"GET /channels/%c2%85/stats" + HOST + b"\r\n",
            "empty name": b"GET /channels//stats" + HOST + b"\r\n",
            "long name": b"GET /channels/" + b"x" * 256 + b"/stats" + HOST + b"\r\n",
        },
    ),
    (
        "400", "timeout must be an integer",
        {
            f"timeout={value}": b"POST /channels/q?timeout=%s" % value.encode() + HOST
            + b"Content-Length: 1\r\n\r\nx"
            for value in ("", "0", "-1", "1.5", "1e3", "0x1", "NaN", "1_0", "%201", "9" * 30,
                          "%D9%A1", "%C2%B2", "%zz", "+1")
        },
    ),
    (
        "400", "id must be an integer",
        {
            "id in letters": b"DELETE /messages/abc" + HOST + b"\r\n",
            "id in Arabic digits": b"DELETE /messages/%D9%A1" + HOST + b"\r\n",
            "id beyond 64 bits": b"DELETE /messages/9223372036854775808" + HOST + b"\r\n",
        },
    ),
    ("400", "the limit is 100 parameters", {"parameters": b"GET /channels?" + b"a&" * 200 + HOST
                                       + b"\r\n"}),
    ("400", "timeout must be UTF-8", {"parameter": b"GET /channels/q?nowait&timeout=%ff" + HOST
                                      + b"\r\n"}),
    ("202", "", {
        "no boundary": POST + b"Content-Type: multipart/form-data\r\nContent-Length: 1\r\n\r\nx"}),
    ("415", "a batch must be", {
        "batch of text": b"POST /channels/q/batch" + HOST + b"Content-Length: 2\r\n\r\n[]"}),
    ("400", "the body must be a JSON array", {
        "nested batch": b"POST /messages/delete" + HOST + b"Content-Length: 1000\r\n\r\n"
        + b"[" * 1000}),
)
# fmt: on


class ReaderTest(unittest.TestCase):
    """The reader of requests, without sockets and without a server."""

    LIMIT = linger.MAX_BATCH_BYTES

    def reader(self, limit=LIMIT):
        cache = linger.RequestCache(linger.HeaderCache())
        return linger.RequestReader(cache, lambda _: limit)

    def read(self, data, size, limit=LIMIT):
        """What a reader makes of bytes that come in pieces of a size; of an error its status."""
        reader, found = self.reader(limit), []
        try:
            for start in range(0, len(data), size):
                reader.feed(data[start : start + size])
                while request := reader.next_request():
                    found.append((request.method, request.target, request.body))
            reader.end()
        except linger.LingerError as error:
            found.append(error.status)
            self.error = str(error)
        return found

    def test_requests_and_errors_do_not_depend_on_how_the_bytes_arrive(self):
        for table in (REFUSED, CLOSED, SERVED):
            for _, _, requests in table:
                for name, data in requests.items():
                    if len(data) < 4_000:
                        with self.subTest(name):
                            whole = self.read(data + CALL, len(data + CALL))
                            self.assertNotEqual(whole, [])
                            for size in (1, 2, 7):
                                self.assertEqual(self.read(data + CALL, size), whole)

    def test_a_request_is_complete_with_its_last_byte_and_not_before(self):
        chunked = CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nA: b\r\n\r\n"
        for data, body in (
            (CALL, b""), (b"\r\n\r\n" + CALL, b""), (LENGTH + b"5\r\n\r\nabcde", b"abcde"),
            (chunked, b"abcde"),
        ):  # fmt: skip
            reader = self.reader()
            for byte in data:
                self.assertIsNone(reader.next_request())
                reader.feed(bytes((byte,)))
            self.assertEqual(reader.next_request().body, body)
            self.assertEqual(reader.buffer, b"")

    def test_what_follows_a_request_is_the_next_one(self):
        self.assertEqual(
            self.read(LENGTH + b"2\r\n\r\nabGET /x HTTP/1.1\r\nHost: x\r\n\r\n", 1_000),
            [("POST", "/channels/q", b"ab"), ("GET", "/x", b"")],
        )

    def test_the_head_is_checked_before_the_body_arrives(self):
        heads = []

        def refuse(request):
            heads.append(request.method)
            raise linger.AccessDenied("no")

        reader = linger.RequestReader(linger.RequestCache(linger.HeaderCache()), refuse)
        reader.feed(LENGTH + b"5\r\n\r\n")
        with self.assertRaises(linger.AccessDenied):
            reader.next_request()
        self.assertEqual((heads, reader.request.method), (["POST"], "POST"))

    def test_a_client_that_expects_100_continue_is_recognized(self):
        expects = LENGTH + b"5\r\nExpect: 100-continue\r\n\r\n"
        for data, expected in (
            (expects, True), (expects + b"h", False), (expects.replace(b"1.1", b"1.0"), False),
            (LENGTH + b"5\r\n\r\n", False),
        ):  # fmt: skip
            reader = self.reader()
            reader.feed(data)
            self.assertIsNone(reader.next_request())
            self.assertEqual(reader.expects_continue, expected, data)

    def test_the_limit_of_a_body_holds_for_both_codings(self):
        for data in (LENGTH + b"6\r\n\r\n", CHUNKED + b"6\r\n", CHUNKED + b"4\r\nabcd\r\n2\r\n"):
            self.assertEqual(self.read(data, 1_000, limit=5), [413])

    def test_an_end_in_the_middle_of_a_request_is_an_error(self):
        for data in (b"", b"\r\n", CALL):
            self.assertEqual(
                self.read(data, 1_000), [("GET", "/topics", b"")] if data == CALL else []
            )
        for data, part in (
            (CALL[:9], "head"), (LENGTH + b"2\r\n\r\na", "body"), (CHUNKED + b"1\r\na", "body"),
        ):  # fmt: skip
            self.assertEqual(self.read(data, 1_000), [400])
            self.assertEqual(self.error, f"the request ended in its {part}")

    def test_a_repeated_head_is_not_parsed_again(self):
        cache = linger.RequestCache(linger.HeaderCache())
        first = cache[CALL[:-4]]
        self.assertIs(cache[CALL[:-4]], first)
        head = b"DELETE /messages/%d?lease=2 HTTP/1.1\r\nHost: x"
        first = cache[head % 1]
        second = cache[head % 22]
        self.assertIs(second, first)
        self.assertEqual((second.target, second.names), ("/messages/22?lease=2", [22]))
        for n in (1, 22):
            request = cache[b"DELETE /messages/%d&a HTTP/1.1\r\nHost: x" % n]  # not an id
            self.assertEqual(request.segments, ["messages", f"{n}&a"])
        self.assertIsNot(cache[head % 10**18], first)  # which may be too large
        long = CALL[:-4] + b"\r\nA: " + b"x" * 5_000
        self.assertIsNot(cache[long], cache[long])


class ReplySlotTest(unittest.TestCase):
    """The pending reply, shared by two threads."""

    def setUp(self):
        self.slot = linger.ReplySlot()

    def test_wait_returns_at_once_when_no_reply_is_pending(self):
        self.assertTrue(self.slot.wait())
        self.slot.expect()
        self.assertTrue(self.slot.is_pending())
        self.slot.complete()
        self.assertTrue(self.slot.wait())

    def test_a_wait_ends_in_time_and_may_be_repeated(self):
        self.slot.expect()
        for _ in range(2):
            self.assertFalse(self.slot.wait(0.001))
            self.assertTrue(self.slot.is_awaited)
        self.slot.complete()
        self.assertTrue(self.slot.wait())
        self.assertFalse(self.slot.is_awaited)

    def test_no_reply_is_missed_however_the_threads_meet(self):
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        sys.setswitchinterval(1e-6)
        rounds, go = 3_000, threading.Semaphore(0)

        def reply():
            for _ in range(rounds):
                go.acquire()
                self.sent += 1
                self.slot.complete()

        self.sent = 0
        replying = threading.Thread(target=reply)
        replying.start()
        for n in range(rounds):
            self.slot.expect()
            go.release()
            self.assertTrue(
                self.slot.wait(0.0001 if n % 3 else PATIENCE) or self.slot.wait(PATIENCE)
            )
            self.assertEqual(self.sent, n + 1)
        replying.join()


class SharedStateTest(ServerTest):
    """What many threads change, without help from the interpreter's lock."""

    options = types.MappingProxyType({"max_waiting": 1})

    def test_no_consumer_is_admitted_beyond_the_limit_however_threads_meet(self):
        meeting = threading.Barrier(2)

        class Slow:
            """Is added to a set only when another is about to be, too, or after a while."""

            def __hash__(self):
                with contextlib.suppress(threading.BrokenBarrierError):
                    meeting.wait(0.2)
                return id(self)

        def admit():
            try:
                self.server.admit_consumer(Slow())
            except linger.Unavailable:
                return False
            return True

        results = [self.thread(admit) for _ in range(2)]
        self.assertEqual(sum(result.result(PATIENCE) for result in results), 1)

    def test_bytes_that_many_threads_reserve_are_all_counted(self):
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        sys.setswitchinterval(1e-6)

        def reserve():
            for _ in range(2_000):
                self.server.memory.reserve(3)
                self.server.memory.force(0, 2)

        for future in [self.thread(reserve) for _ in range(4)]:
            future.result(PATIENCE)
        self.assertEqual(self.server.memory.used, 8_000)


class PortabilityTest(unittest.TestCase):
    def test_a_timeout_has_the_size_that_the_kernel_says(self):
        for size in (8, 16):
            kernel = unittest.mock.Mock()
            kernel.getsockopt.return_value = bytes(size)
            self.assertEqual(struct.calcsize(linger.timeval_format(kernel)), size)

    @unittest.skipUnless(sys.platform.startswith("linux"), "needs Linux")
    def test_sqlite_counts_no_memory_unless_it_is_in_use(self):
        code = """
import _sqlite3, ctypes, linger, sqlite3, sys
if "open" in sys.argv:
    before = sqlite3.connect(":memory:")
linger.tune_sqlite()
after = sqlite3.connect(":memory:")
after.execute("create table t (x)")
linger.tune_sqlite()
library = ctypes.CDLL(_sqlite3.__file__)
was_shut_down = library.sqlite3_config(linger.SQLITE_CONFIG_MEMSTATUS, 0) == 0
print(library.sqlite3_memory_used() > 0, was_shut_down)
"""
        for argument, counts in (("", "False False\n"), ("open", "True False\n")):
            self.assertEqual(run_python(code, argument, options=["-S"]).stdout, counts)

    def test_the_objects_of_the_program_are_not_searched_for_garbage(self):
        code = "import gc, linger; linger.tune_memory(); print(len(gc.get_objects()) < 5_000)"
        self.assertEqual(run_python(code, options=["-S"]).stdout, "True\n")

    def test_timeouts_are_kept_in_that_format(self):
        left, right = socket.socketpair(socket.AF_UNIX)
        with left, right, unittest.mock.patch.object(socket.socket, "setsockopt") as options:
            linger.PlainStream(left, "=qq").set_timeout(2.5)
        timeouts = [call[0][2] for call in options.call_args_list]
        expected = [(linger.SEND_TIMEOUT, 0), (2, 500_000)]
        self.assertEqual([struct.unpack("=qq", timeout) for timeout in timeouts], expected)

    def test_a_disconnect_is_noticed_even_where_poll_does_not_report_it(self):
        events = select.POLLHUP | select.POLLERR
        for patch in (
            {"POLLRDHUP": linger.POLLRDHUP},
            {"POLLRDHUP": 0, "DISCONNECT_EVENTS": events},
        ):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                client = socket.create_connection(listener.getsockname())
                served, _ = listener.accept()
            with served, unittest.mock.patch.multiple(linger, **patch):
                stream = linger.PlainStream(served, "@ll")
                self.assertFalse(stream.is_disconnected())
                client.sendall(b"x")
                self.assertFalse(stream.is_disconnected())
                self.assertEqual(stream.receive(10), b"x")
                client.close()
                self.assertTrue(stream.is_disconnected())


class WireTest(ServerTest):
    """Requests as bytes: RFC 9110 and 9112, and who abuses them."""

    options = types.MappingProxyType({"read_timeout": 1})

    def check(self, table, closed):
        """That each request of a table gets its answers, and that nothing is left out of step: a
        canary sent behind it is not touched if the connection is closed, else served once."""
        self.broker.subscribe("tag", "tag")
        for statuses, sentence, requests in table:
            for name, request in requests.items():
                with self.subTest(name):
                    self.broker.drain("canary")
                    answers = self.talk(request + CANARY + FOLLOW_UP)
                    found = re.findall(rb"HTTP/1\.1 ([0-9]+)", answers)
                    expected = statuses.split() + ([] if closed else ["202", "200"])
                    self.assertEqual(b" ".join(found).decode(), " ".join(expected))
                    if sentence:
                        error = re.findall(rb'\r\n\r\n({"error":".*})\n', answers)[-1]
                        self.assertEqual(json.loads(error)["error"][: len(sentence)], sentence)
                    if not closed:
                        self.assertTrue(answers.endswith(b'\r\n\r\n{"channels":["tag"]}\n'))
                    counts = [self.broker.channel_stats(c)["ready"] for c in ("canary", "smuggled")]
                    self.assertEqual(counts, [not closed, 0])

    def test_requests_without_a_certain_end_are_refused_and_the_connection_closed(self):
        self.check(REFUSED, closed=True)

    def test_requests_that_ask_for_it_are_served_and_the_connection_closed(self):
        self.check(CLOSED, closed=True)

    def test_complete_requests_are_answered_and_the_connection_stays_open(self):
        self.check(SERVED, closed=False)

    def test_responses_are_the_same_when_every_byte_arrives_separately(self):
        def short(table):
            for statuses, sentence, requests in table:
                yield statuses, sentence, {n: r for n, r in requests.items() if len(r) < 2_000}

        with trickling():
            for table, closed in ((REFUSED, True), (CLOSED, True), (SERVED, False)):
                self.check(short(table), closed)

    def test_a_request_that_ends_too_early_is_not_processed(self):
        post = b"POST /channels/q HTTP/1.1\r\nHost: x\r\n"
        for request in (
            post,
            post + b"Content-Length: 5\r\n\r\nhell",
            post + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhell",
            post + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
        ):
            with self.subTest(request):
                self.assertEqual(self.statuses(request), [400])
                self.assertEqual(self.broker.channels(), [])

    def test_405_lists_the_allowed_methods(self):
        for path, allowed in (
            ("/topics", "GET, HEAD, OPTIONS"),
            ("/channels/x", "GET, POST, DELETE, OPTIONS"),
            ("/messages/1/touch", "POST, OPTIONS"),
            ("/messages/1", "GET, PATCH, DELETE, HEAD, OPTIONS"),
            ("/messages/delete", "POST, OPTIONS"),
        ):
            self.assertEqual(self.call("PUT", path)[1]["Allow"], allowed)
            self.assertEqual(self.call("OPTIONS", path)[1]["Allow"], allowed)

    def test_head_responds_like_get_and_takes_nothing(self):
        self.broker.post("q", b"x")
        for path in ("/", "/channels", "/channels/q/stats", "/topics"):
            get, head = self.call("GET", path), self.call("HEAD", path)
            self.assertEqual((head[0], head[2]), (200, b""))
            self.assertEqual(get[1]["Content-Length"], head[1]["Content-Length"])
        self.assertEqual(self.call("HEAD", "/channels/q")[0], 405)
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 0})

    def test_every_response_has_date_server_and_length(self):
        for path in ("/", "/nowhere", "/channels/q?nowait"):
            status, headers, body = self.call("GET", path)
            self.assertEqual(headers["Server"], f"Linger/{linger.__version__}")
            self.assertRegex(headers["Date"], r"^\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT$")
            if status != 204:
                self.assertEqual(int(headers["Content-Length"]), len(body))

    def test_a_request_may_arrive_one_byte_at_a_time(self):
        request = (
            b"POST /channels/q HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3;a=b\r\nabc\r\n00A \r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"
        )
        self.assertEqual(self.statuses(*(request[i : i + 1] for i in range(len(request)))), [202])
        self.assertEqual(self.broker.get("q").body, b"abc0123456789")

    def test_the_limits_of_a_head_are_the_same_however_it_arrives(self):
        pieces = []
        longest = linger.MAX_REQUEST_LINE - len("GET / HTTP/1.1")
        headers = b"".join(b"A:%s\r\n" % (b"x" * n) for n in [8_188] * 7 + [8_179])
        self.assertEqual(len(b"\r\nHost: x\r\n" + headers[:-2]), linger.MAX_HEAD)
        with trickling(lambda: pieces[0]):
            for more, statuses in ((0, (404, 404)), (1, (414, 431))):
                line = b"GET /" + b"x" * (longest + more) + HOST
                end = b"B" * more + headers + b"\r\n"
                for size in (1_000, 65_536):
                    pieces[:] = [size]
                    self.assertEqual(self.statuses(line + b"\r\n"), [statuses[0]], size)
                    self.assertEqual(self.statuses(b"GET /no" + HOST + end), [statuses[1]], size)

    def test_empty_lines_before_a_request_may_arrive_in_pieces(self):
        connection = self.connect()
        connection.sendall(b"\r\n\r")
        self.await_read()
        connection.sendall(b"\n" + CALL)
        self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 200"))
        self.assertEqual(self.statuses(b"\r\n\n\r" + CALL), [400])

    def test_long_headers_are_not_cached(self):
        connection = self.connect()
        for n in range(3):
            connection.sendall(CALL[:-2] + b"A: %d" % n + b"x" * 5_000 + b"\r\n\r\n")
            connection.recv(1000)
        self.assertEqual(len(self.server.header_cache), 0)

    def test_headers_are_cached_for_all_connections_unless_they_are_secret(self):
        for line in (b"A: b", b"Authorization: Bearer x", b"Idempotency-Key: x", b"A: b"):
            self.talk(CALL[:-2] + line + b"\r\n\r\n")
        self.assertEqual(len(self.server.header_cache), 1)
        for n in range(2 * linger.HEADER_CACHE):
            self.talk(CALL[:-2] + b"A: %d\r\n\r\n" % n)
        self.assertLessEqual(len(self.server.header_cache), linger.HEADER_CACHE)

    def test_repeated_heads_are_cached_but_not_their_bodies(self):
        connection = self.connect()
        head = (
            b" /channels/q HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n"
            b"Content-Type: application/x-www-form-urlencoded\r\n\r\n"
        )

        def status(method, form):
            connection.sendall(method + head + form)
            return int(connection.recv(1000).split()[1])

        self.assertEqual([status(b"POST", b"priority=%02d&msg=x" % n) for n in range(6)], [202] * 6)
        listed = [message.priority for message, _ in self.broker.list_messages("q")]
        self.assertEqual(listed, list(range(6)))
        self.assertEqual(
            [status(b"GET", b"wait=9&auto=1&n=" + n) for n in (b"1", b"0", b"2")], [200, 400, 200]
        )

    def test_a_request_that_is_no_post_may_have_a_short_body_only(self):
        body = b"x" * 60_000
        connection = self.connect()
        connection.sendall(
            b"GET /channels/q HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + body
        )
        until(lambda: count_waiting(self.broker, "q"))
        self.assertEqual(self.call("GET", "/channels", b"x" * 70_000)[0], 413)
        self.broker.post("q", b"y")
        self.assertTrue(connection.recv(1000).endswith(b"\r\n\r\ny"))

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs Linux")
    def test_a_server_that_was_closed_leaves_no_descriptor(self):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            linger.serve().close()
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)

    def test_a_response_can_be_read_although_more_was_sent_than_is_served(self):
        for _ in range(20):
            with self.connect() as connection:
                connection.sendall(GET + b"Connection: close\r\n\r\n" + CALL * 1000)
                answer = b"".join(iter(lambda c=connection: c.recv(1), b""))  # no reset before
            self.assertEqual(answer.count(b"HTTP/1.1 200 OK"), 1)

    def test_nothing_is_served_after_a_close_even_if_another_thread_replies(self):
        for close in (POST.replace(b"/1.1", b"/1.0"), POST + b"Connection: close\r\n"):
            connection = self.connect()
            until(lambda: self.server.connections)
            committing, gate = threading.Event(), threading.Event()
            self.addCleanup(gate.set)

            def hold(_, committing=committing, gate=gate):
                committing.set()
                gate.wait(PATIENCE)

            posting = self.thread(self.broker.post_async, hold, "other", b"x", "text/plain")
            self.assertTrue(committing.wait(PATIENCE))
            connection.sendall(close + b"Content-Length: 1\r\n\r\nx" + CANARY)
            self.await_read()
            gate.set()
            posting.result(PATIENCE)
            answers = b"".join(iter(lambda c=connection: c.recv(1000), b""))
            self.assertEqual(re.findall(rb"HTTP/1\.1 ([0-9]+)", answers), [b"202"])
            until(lambda: not self.server.connections)
        until(lambda: not self.server.active)
        self.assertNotIn("canary", self.broker.channels())

    def test_pipelined_requests_are_answered_in_order(self):
        with self.connect() as connection:
            connection.sendall(
                b"".join(b"GET /topics/%d HTTP/1.1\r\nHost: x\r\n\r\n" % n for n in range(3))
                + CANARY
                + b"GET /channels/canary/stats HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            )
            answers = b"".join(iter(lambda: connection.recv(65_536), b""))
        self.assertEqual(
            re.findall(rb"HTTP/1\.1 ([0-9]+)", answers), [b"405", b"405", b"405", b"202", b"200"]
        )
        self.assertTrue(answers.endswith(b'{"ready":1,"hidden":0}\n'))

    def test_expect_100_continue_is_answered_before_the_body(self):
        head = b"POST /channels/q HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: "
        with self.connect() as connection:
            connection.sendall(head + b"1\r\n\r\n")
            self.assertEqual(connection.recv(1000), b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.sendall(b"x")
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 202 "))
        self.assertEqual(self.statuses(head + b"999999999\r\n\r\n"), [413])
        old = head.replace(b"1.1", b"1.0") + b"1\r\n\r\n"
        self.assertEqual(self.statuses(old, b"x"), [202])

    def test_an_error_can_be_read_while_the_body_is_still_being_sent(self):
        head = b"POST /channels/q HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n"
        self.assertEqual(self.statuses(head, b"x" * 2_000_000), [413])

    def test_a_head_that_takes_too_long_is_408(self):
        self.server.read_timeout = 0.2
        start = time.monotonic()
        with self.connect() as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nA: ")
            with contextlib.suppress(OSError):
                while not select.select([connection], [], [], 0.1)[0]:
                    connection.sendall(b"x")
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 408 "))
        self.assertLess(time.monotonic() - start, 3)

    def test_a_body_that_takes_too_long_is_408_and_not_kept(self):
        self.server.read_timeout = 0.1
        for framing in (
            b"Content-Length: 9\r\n\r\nx",
            b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
        ):
            answer = self.talk(
                b"POST /channels/q HTTP/1.1\r\nHost: x\r\n" + framing, half_close=False
            )
            self.assertTrue(answer.startswith(b"HTTP/1.1 408 "))
        self.assertEqual(self.broker.channels(), [])

    def test_a_silent_connection_is_closed(self):
        self.server.idle_timeout = 0.05
        self.assertEqual(self.talk(b"", half_close=False), b"")

    def test_a_client_that_closes_its_sending_half_is_answered(self):
        self.broker.post("q", b"x")
        answer = self.talk(b"GET /channels/q HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertTrue(answer.endswith(b"\r\n\r\nx"))

    def test_heads_that_differ_only_in_an_id_are_different_requests(self):
        targets = [
            *(f"POST /channels/a%20b/batch?n={n}" for n in range(4)),
            *("GET /channels/a%20b?nowait",) * 2,
            *(f"GET /channels/a%20b?nowait&ack={id}&lease=1" for id in (1, 2, 2, 3, 99)),
            *(f"GET /channels/a%20b,c?ack={id}&nowait" for id in (4, "5x", "+5", 5, "%36", 7)),
            *(f"GET /channels/a%20b?nowait&ack=9&ack={id}" for id in (6, 1, "", 8)),
            *(f"GET /channels/a%20b?n=1&nowait&ack={id}" for id in (9, 10)),
            *(f"GET /channels/a%20b?nowait&ack={id}&%61ck=17" for id in (1, 18)),
            *(f"GET /channels/a%20b?nowait&lease={id}&ack=11" for id in (7, 1)),
            *(f"POST /messages/{id}/touch" for id in (12, 1, 13)),
            *(f"DELETE /messages/{id}?lease=1" for id in (12, 13, "13x", "", "+14", "%31")),
            *(f"DELETE /messages/{id}" for id in (14, 14, 15)),
            *(f"PUT /messages/{id}" for id in (14, 16)),
            *(f"DELETE /messages/{id}/nothing" for id in (16, 17)),
            *(f"GET /messages/{id}" for id in (16, 17, 1)),
        ]
        body = b'[{"body":"1"},{"body":"2"},{"body":"3"},{"body":"4"},{"body":"5"}]'
        head = b"%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        requests = [
            head % target.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(sent), sent)
            for target in targets
            for sent in (body if "batch" in target else b"",)
        ]
        told = re.compile(rb"HTTP/1\.1 ([0-9]+)|x-linger-msg-id: ([0-9]+)")
        apart = [told.findall(self.talk(request)) for request in requests]
        other = linger.serve(allow_host="x")
        self.addCleanup(other.close)
        self.address = other.server_address[:2]
        together = told.findall(self.talk(*requests))
        self.assertEqual(together, list(itertools.chain.from_iterable(apart)))
        statuses = {int(answer[0][0]) for answer in apart}
        self.assertEqual(statuses, {200, 202, 204, 400, 404, 405, 409})

    def test_many_connections_in_one_instant_are_all_served(self):
        connections = [self.connect() for _ in range(300)]
        for connection in connections:
            connection.sendall(CALL)
        for connection in connections:
            self.assertTrue(connection.recv(100).startswith(b"HTTP/1.1 200"))

    def test_closed_connections_leave_nothing_behind(self):
        for _ in range(300):
            self.connect().close()
        until(lambda: not self.server.connections and not self.server.active)


class FuzzTest(ServerTest):
    """Whatever bytes come: no mistake of ours, no hang, and the same however they are cut."""

    seconds = float(os.environ.get("LINGER_TEST_SECONDS", "1"))
    seed = int(os.environ.get("LINGER_TEST_SEED", "1"))

    BODIES = (
        ("/channels/q", "", b"hello"),
        ("/channels/q", FORM["Content-Type"], b"msg=a%20b+c&timeout=5&priority=-1&dedup=k"),
        ("/channels/q/topics/t", FORM["Content-Type"], b"linger=60&dead=d&backoff=1,2"),
        ("/channels/q", 'multipart/form-data; boundary="b"', b"--b\r\nContent-Disposition:"
         b' form-data; name="msg"\r\n\r\nhi\r\n--b\r\nA: b; name=timeout\r\n\r\n5\r\n--b--\r\n'),
        ("/channels/q/batch", "application/x-ndjson", b'{"a": 1}\n\n{"b": [2]}\n'),
        ("/channels/q/batch?deliver=2", "application/json", b'[{"body": "x", "timeout": 5},'
         b' {"body": "eA==", "encoding": "base64", "type": "a/b", "unique": "\\ud83d\\ude00"}]'),
        ("/topics/t/batch", "application/json", b'[{"body": "\xc3\xa4", "dedup": "k"}]'),
        ("/messages/delete", "application/json", b'[1, {"id": 2, "lease": 3}, -4, 5e6]'),
        ("/messages/1/release?delay=5", "", b"out of paper"),
        ("/channels/q/settings?hlm=9", "", b""),
        ("/channels/q/redrive?n=5&to=r", "", b""),
    )  # fmt: skip
    PIECES = (
        b"\r\n", b"\r", b"\n", b"\r\n\r\n", b"\0", b"\xff", b"\x85", b" ", b"\t", b":", b";", b",",
        b"%", b"%00", b"%ff", b"+", b"=", b"&", b'"', b"\\", b"\\ud800", b"[", b"]", b"{", b"}",
        b"-", b"_", b"0x", b"0", b"9" * 20, b"-1", b"1e9", b"1.5", b"NaN", b"null", b"true", b"--b",
        b"--b--", b'name="', b"msg=", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
        b"0\r\n\r\n", b"Expect: 100-continue\r\n", b"HTTP/1.0", "\u0661".encode(), CALL,
    )  # fmt: skip
    MAX_REFUSED_CONNECTIONS = frozenset(b"400 403 413 414 415 417 431 501 505".split())

    def setUp(self):
        super().setUp()
        self.random = random.Random(self.seed)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.listener.close)
        self.mistakes = []
        for name, value in (("DEFAULT_WAIT", 0), ("MAX_WAIT", 0), ("log", self.mistakes.append)):
            patch = unittest.mock.patch.object(linger, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def mutate(self, data):
        """The bytes with one to four faults."""
        for _ in range(self.random.randint(1, 4)):
            at, to = sorted(self.random.randint(0, len(data)) for _ in range(2))
            data = self.random.choice((
                lambda d, a, t: d[:a] + self.random.choice(self.PIECES) + d[a:],
                lambda d, a, t: d[:a] + self.random.choice(self.PIECES) + d[a + 1 :],
                lambda d, a, t: d[:a] + bytes([self.random.randrange(256)]) + d[a + 1 :],
                lambda d, a, t: d[:a] + d[t:],
                lambda d, a, t: d[:t] + d[a:],
                lambda d, a, t: d[:a] + d[a : a + 8] * self.random.choice((2, 50, 2_000)) + d[a:],
            ))(data, at, to)  # fmt: skip
        return data[:60_000]

    def request(self, corpus):
        """A request that is broken somewhere, or whose body is."""
        if self.random.random() < 0.5:
            return self.mutate(self.random.choice(corpus))
        path, kind, body = self.random.choice(self.BODIES)
        body, method = self.mutate(body), "PUT" if "topics/" in path[1:] else "POST"
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def answers(self, data, most=65_536):
        """The statuses that a connection gives for bytes that come in pieces of up to `most`."""
        with socket.create_connection(self.listener.getsockname(), PATIENCE) as client:
            served, address = self.listener.accept()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1_000_000)
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            start = time.monotonic()
            with served, trickling(lambda: self.random.randint(1, most)):
                self.server.finish_request(served, address)
            self.assertLess(time.monotonic() - start, 2, data)
            found = b"".join(iter(lambda: client.recv(65_536), b""))
        statuses = re.findall(rb"HTTP/1\.1 ([0-9]+)", found)
        self.assertEqual((self.mistakes, b"500" in statuses), ([], False), data)
        return [s in self.MAX_REFUSED_CONNECTIONS for s in statuses if s != b"100"]

    def test_no_bytes_make_it_fail_or_depend_on_how_they_arrive(self):
        corpus = [
            request
            for table in (REFUSED, CLOSED, SERVED)
            for _, _, requests in table
            for request in requests.values()
            if len(request) < 2_000
        ]
        deadline = time.monotonic() + self.seconds
        count = 0
        while time.monotonic() < deadline or count < 50:
            data = self.request(corpus) + self.random.choice((b"", CALL))
            whole = self.answers(data)
            most = self.random.choice((1, 7, 300)) if len(data) < 3_000 else 20_000
            self.assertEqual(self.answers(data, most), whole, data)
            count += 1
            if count % 500 == 0:
                for channel in self.broker.channels():
                    self.broker.drain(channel)


class LiveTest(ServerTest):
    """Streams of events over HTTP."""

    def listen(self, path="/channels/q/live", accept="application/x-ndjson", **headers):
        """The response to which events come, after the sign of life with which it begins."""
        client = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        self.addCleanup(client.close)
        client.request("GET", path, headers={"Accept": accept, **headers})
        response = client.getresponse()
        self.addCleanup(response.close)
        self.assertEqual(response.status, 200)
        self.assertEqual(response.readline(), b"\n" if "ndjson" in accept else b"retry: 1000\n")
        return response

    def events(self, stream, n):
        return [json.loads(stream.readline()) for _ in range(n)]

    def test_a_line_of_json_is_sent_for_each_event(self):
        stream = self.listen()
        self.call("POST", "/channels/q", "häh?".encode(), {"Content-Type": "text/x"})
        self.call("GET", "/channels/q?auto")
        posted, *others = self.events(stream, 3)
        message = {"id": 1, "channel": "q", "priority": 0, "timeout": 30, "deliver": 0,
                   "delivered": 0, "received": 0, "linger": 0, "topic": "", "lease": 0,
                   "type": "text/x", "body": "häh?"}  # fmt: skip
        self.assertEqual(posted, {"event": "posted", **message})
        self.assertEqual([e["event"] for e in others], ["delivered", "deleted"])
        self.assertEqual(stream.headers["Content-Type"], "application/x-ndjson")

    def test_by_default_server_sent_events_come(self):
        stream = self.listen("/topics/a%20b/live", "*/*")
        self.call("POST", "/topics/a%20b", b"\xff\n")
        lines = [stream.readline() for _ in range(3)]
        while lines[1] == b":\n":  # a sign of life, from a server that is slow
            lines = [lines[2], stream.readline(), stream.readline()]
        self.assertEqual(lines[::2], [b"\n", b"\n"])
        self.assertTrue(lines[1].startswith(b"data: "), lines)
        self.assertEqual(json.loads(lines[1][6:]), {
            "topic": "a b", "type": "text/plain", "body": "/wo=", "encoding": "base64",
        })  # fmt: skip
        headers = ("Content-Type", "Cache-Control", "X-Accel-Buffering", "Connection")
        self.assertEqual([stream.headers[name] for name in headers],
                         ["text/event-stream", "no-store", "no", "close"])  # fmt: skip

    def test_a_long_body_is_cut_and_the_event_says_so(self):
        stream = self.listen()
        self.broker.post("q", b"\x01" * 65_535 + "ä".encode())
        (event,) = self.events(stream, 1)
        self.assertEqual((event["body"], event["cut"]), ("\x01" * 65_535, True))

    def test_a_moved_message_says_from_where(self):
        stream = self.listen("/channels/dead/live")
        self.broker.post("q", b"x", dead="dead")
        self.broker.reject(1)
        (event,) = self.events(stream, 1)
        self.assertEqual([event[key] for key in ("event", "from", "channel", "dead-reason")],
                         ["moved", "q", "dead", "reject"])  # fmt: skip

    def test_http_1_0_gets_a_stream_without_chunks(self):
        with self.connect() as connection, connection.makefile("rb") as file:
            connection.sendall(b"GET /channels/q/live HTTP/1.0\r\n\r\n")
            head = b"".join(iter(file.readline, b"\r\n"))
            self.assertNotIn(b"Transfer-Encoding", head)
            self.assertEqual([file.readline(), file.readline()], [b"retry: 1000\n", b"\n"])
            self.broker.post("q", b"x")
            self.assertTrue(file.readline().startswith(b'data: {"event":"posted"'))

    def test_head_gets_the_head_and_the_connection_stays_usable(self):
        with contextlib.closing(http.client.HTTPConnection(*self.address, PATIENCE)) as client:
            for _ in range(2):
                client.request("HEAD", "/topics/x/live")
                response = client.getresponse()
                self.assertEqual(response.read(), b"")
                self.assertEqual(response.headers["Content-Type"], "text/event-stream")
        self.assertEqual(self.broker._state.live.topics, {})

    def test_a_client_that_leaves_is_forgotten(self):
        with unittest.mock.patch.object(linger, "LISTENER_CHECK_INTERVAL", 0.01):
            stream = self.listen()
            stream.close()
            until(lambda: not self.broker._state.live.channels)
            until(lambda: not self.server._waiting)

    def test_streams_count_as_waiting_consumers(self):
        self.server.max_waiting = 1
        self.listen()
        self.assertEqual(self.call("GET", "/channels/q/live")[0], 503)
        self.assertEqual(self.call("GET", "/channels/q?nowait")[0], 204)

    def test_a_stop_ends_streams_properly_and_breaks_those_that_are_not_read(self):
        deaf = self.connect_narrowly()
        deaf.sendall(b"GET /channels/q/live HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: self.broker._state.live.channels)
        stream = self.listen()
        for _ in range(10):  # far more than the buffers of the deaf one hold
            self.broker.post("q", b"x" * 60_000)
            self.events(stream, 1)
        began = time.monotonic()
        self.server.close()
        self.assertLess(time.monotonic() - began, linger.STOP_TIMEOUT)
        self.assertEqual(stream.read(), b"")  # IncompleteRead without the last chunk
        received = receive_all(deaf)
        self.assertTrue(received.startswith(b"HTTP/1.1 200 "), received[:100])
        self.assertFalse(received.endswith(b"0\r\n\r\n"))

    def test_a_client_that_does_not_read_delays_no_other_and_is_disconnected(self):
        self.listen()
        until(lambda: self.broker._state.live.channels["q"].waiting)
        (reader,) = self.broker._state.live.channels["q"].readers
        with unittest.mock.patch.object(linger, "BEHIND_TIME", 0):
            while not reader.is_slow:
                self.broker.post("q", b"x" * 60_000)
        until(lambda: not self.server._waiting)
        self.assertEqual(self.server.memory.used, 0)

    def test_a_page_of_another_site_gets_no_stream(self):
        foreign = {"Origin": "http://b.example"}
        self.assertEqual(self.call("GET", "/channels/q/live", None, foreign)[0], 403)


class StopTest(ServerTest):
    """A stop while a request is just coming: its thread has read it and has not yet looked at it,
    so that its connection seems to be idle."""

    WHOLE = b"POST /channels/q HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"

    def answer(self, begun):
        """The bytes that the server sends when it is stopped at that moment."""
        arrived = threading.Event()
        with wrapping_connections(lambda connection: HeldBack(connection, arrived)):
            connection = self.connect()
            connection.sendall(begun)
            self.assertTrue(arrived.wait(PATIENCE))
            self.server.close()
            return connection.recv(1000)

    def test_a_whole_request_is_answered(self):
        self.assertTrue(self.answer(self.WHOLE).startswith(b"HTTP/1.1 202 "))

    def test_one_whose_body_has_not_arrived_gets_no_response(self):
        self.assertEqual(self.answer(self.WHOLE[:-5]), b"")

    def test_one_whose_head_has_just_begun_gets_no_response(self):
        self.assertEqual(self.answer(self.WHOLE[:20]), b"")

    def test_one_in_the_middle_of_a_chunk_gets_no_response(self):
        head = b"POST /channels/q HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        for begun in (head, head + b"5\r\nhel", head + b"5\r\nhello\r\n0\r\n"):
            self.setUp()
            self.assertEqual(self.answer(begun), b"")

    def test_no_good_request_gets_4xx_however_it_meets_the_stop(self):
        for _ in range(10):
            self.setUp()
            connections = [self.connect() for _ in range(8)]
            for connection in connections:
                connection.sendall(self.WHOLE)
                self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 202 "))
            stopping = self.thread(self.server.close)
            answers = b""
            for connection in connections:
                with contextlib.suppress(OSError):
                    for piece in (self.WHOLE[:40], self.WHOLE[40:-5], self.WHOLE[-5:]):
                        connection.sendall(piece)
                    answers += connection.recv(1000)
            stopping.result(PATIENCE)
            statuses = set(re.findall(rb"HTTP/1\.1 ([0-9]+)", answers))
            self.assertLessEqual(statuses, {b"202", b"503"})


class WorstCaseTest(ServerTest):
    """Requests made so that they take long: none takes a time that grows with its square."""

    def post(self, path, kind, body, status):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
        start = time.process_time()
        found = self.statuses(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.assertEqual(found, [status])
        self.assertLess(time.process_time() - start, 2, body[:20])

    def test_forms(self):
        for body in (b"%" * 800_000, b"%41" * 260_000, b"%41x" * 200_000):
            self.post("/channels/q", FORM["Content-Type"], b"msg=" + body, 413)
        head = b"--b\r\nContent-Disposition: form-data"
        for body in (b";" * 800_000, b'; name="' * 100_000, b" ;" * 400_000, b"\r\n--b" * 150_000):
            self.post("/channels/q", "multipart/form-data; boundary=b", head + body, 413)
        for body in (b"msg=&" + b"&" * 700_000, b"msg=" + b"&a" * 350_000):
            self.post("/channels/q", FORM["Content-Type"], body, 400)
        for body in (
            b"msg=&" + b"a" * 700_000 + b" ",
            b"a" * 700_000 + b"&msg=&=",
            b"a=&" * 250_000,
        ):
            self.post("/channels/q", FORM["Content-Type"], body, 413)

    def test_batches(self):
        for body in (b'["' + b'"' * 7_000_000, b"[" + b"1" * 3_000_000 + b"]", b"[" * 7_000_000,
                     b'["' + b"\\" * 7_000_000, b"[" + b"{}" * 3_000_000,
                     b"[" + b"1" * 1000 + b"]"):  # fmt: skip
            self.post("/channels/q/batch", "application/json", body, 400)
        self.post("/channels/q/batch", "application/x-ndjson", b"\n" * 7_000_000, 413)

    def test_chunks_and_trailers(self):
        for body in (b"1\r\nx\r\n" * 16_000, (b"1;" + b"x" * 250 + b"\r\nx\r\n") * 16_000):
            start = time.process_time()
            self.assertEqual(self.statuses(CHUNKED + body + b"0\r\n\r\n"), [202])
            self.assertEqual(self.statuses(CHUNKED + b"0\r\n" + b"A:\r\n" * 1_600 + CALL), [400])
            self.assertLess(time.process_time() - start, 2)

    def test_a_long_chunk_in_small_pieces_is_not_copied_again_with_each(self):
        head = b"POST /channels/q/batch" + HOST + b"Content-Type: application/x-ndjson\r\n"
        with trickling(lambda: 300):
            start = time.process_time()
            self.assertEqual(
                self.statuses(
                    head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % 6_000_000,
                    b"\n" * 6_000_000 + b"\r\n0\r\n\r\n",
                ),
                [413],
            )
            self.assertLess(time.process_time() - start, 2)


class TogetherTest(ServerTest):
    """Requests sent on several connections without waiting for an answer."""

    def test_a_first_request_that_reads_waits_for_one_that_came_with_it(self):
        get = b"GET /channels/q?nowait HTTP/1.1\r\nHost: x\r\n\r\n"
        waiting, real = threading.Event(), linger.FirstRequests.wait

        def wait(*arguments):
            waiting.set()
            real(*arguments)

        with unittest.mock.patch.multiple(linger, SIMULTANEOUS_WINDOW=PATIENCE), \
                unittest.mock.patch.object(linger.FirstRequests, "wait", wait):  # fmt: skip
            post, reading = self.connect(), self.connect()
            post.sendall(b"POST /channels/q HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
            reading.sendall(get)
            self.assertTrue(waiting.wait(PATIENCE))
            self.assertEqual(select.select([reading], [], [], 0)[0], [])
            post.sendall(b"x")
            self.assertTrue(reading.recv(1000).endswith(b"\r\n\r\nx"))
            self.connect()  # the second request waits for nobody
            reading.sendall(get)
            self.assertTrue(reading.recv(1000).startswith(b"HTTP/1.1 204 "))

    def test_two_that_read_do_not_wait_for_each_other(self):
        with unittest.mock.patch.object(linger, "SIMULTANEOUS_WINDOW", PATIENCE):
            connections = [self.connect() for _ in range(2)]
            until(lambda: len(self.server.active) == 2)
            for connection in connections:
                connection.sendall(CALL)
            for connection in connections:
                self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 200 "))

    def test_nobody_waits_for_a_connection_that_is_silent(self):
        with unittest.mock.patch.object(linger, "SIMULTANEOUS_WINDOW", PATIENCE):
            self.connect()
            until(lambda: len(self.server.active) == 1)
            start = time.monotonic()
            self.assertEqual(self.call("GET", "/topics")[0], 200)
            self.assertLess(time.monotonic() - start, PATIENCE / 2)


class CapTest(ServerTest):
    options = types.MappingProxyType({"max_connections": 3})

    def test_connections_beyond_the_limit_get_503_and_others_stay(self):
        kept = [self.connect() for _ in range(3)]
        for connection in kept:
            connection.sendall(CALL)
            connection.recv(1000)
        answer = self.talk(CALL)
        self.assertTrue(answer.startswith(b"HTTP/1.1 503 "))
        self.assertIn(b"\r\nRetry-After: 1\r\n", answer)
        kept[0].sendall(CALL)
        self.assertTrue(kept[0].recv(1000).startswith(b"HTTP/1.1 200 "))
        kept.pop().close()
        until(lambda: self.talk(CALL).startswith(b"HTTP/1.1 200 "))


class ClientCapTest(ServerTest):
    options = types.MappingProxyType({"max_connections_per_address": 2})

    def test_one_address_has_a_bounded_number_of_connections_and_others_go_on(self):
        kept = [self.connect() for _ in range(2)]
        for connection in kept:
            connection.sendall(CALL)
            connection.recv(1000)
        self.assertTrue(self.talk(CALL).startswith(b"HTTP/1.1 503 "))
        with socket.create_connection(self.address, PATIENCE, ("127.0.0.2", 0)) as other:
            other.sendall(CALL)
            self.assertTrue(other.recv(1000).startswith(b"HTTP/1.1 200 "))
        kept.pop().close()
        until(lambda: self.talk(CALL).startswith(b"HTTP/1.1 200 "))
        kept.pop().close()
        until(lambda: not self.server.connections)
        self.assertEqual(len(self.server.clients), 0)

    def test_beyond_the_limit_of_503s_connections_are_closed(self):
        with unittest.mock.patch.object(linger, "MAX_REFUSED_CONNECTIONS", 0):
            kept = [self.connect() for _ in range(2)]
            until(lambda: len(self.server.connections) == 2)
            self.assertEqual(self.talk(CALL, half_close=False), b"")
        self.assertEqual(len(kept), 2)

    def test_of_ipv6_a_network_counts_and_of_ipv4_an_address(self):
        for first, second, same in (
            ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
            ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
            ("fe80::1%lo", "fe80::2%lo", True),
            ("192.0.2.1", "192.0.2.2", False),
            ("192.0.2.1", "::ffff:192.0.2.1", True),
            ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ):
            clients = linger.AddressLimiter(1)
            self.assertEqual(clients.acquire(object(), first), 0)
            self.assertEqual(clients.acquire(object(), second), int(same))


class OverflowTest(ServerTest):
    """The system refuses threads, as with a limit of processes."""

    REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"

    def refuse_threads(self):
        refusing = unittest.mock.patch("_thread.start_new_thread", side_effect=RuntimeError)
        self.addCleanup(refusing.stop)
        refusing.start()
        return refusing

    def test_connection_without_a_thread_gets_503_also_while_its_client_still_sends(self):
        self.hasten(LINGERING_CLOSE_TIMEOUT=0.1)
        refusing = self.refuse_threads()
        for request in (self.REQUEST, b"POST /channels/q HTTP/1.1\r\n" + b"x" * 1_000_000):
            with self.connect() as connection:
                connection.sendall(request)
                response = b""
                while data := connection.recv(1_000):
                    response += data
            self.assertTrue(response.startswith(b"HTTP/1.1 503 "), response)
            self.assertIn(b"\r\nRetry-After: ", response)
            self.assertIn(b"\r\nConnection: close\r\n", response)
            self.assertIn(b"no thread", response)
        until(lambda: not self.server.connections)
        refusing.stop()
        self.assertEqual(self.call("GET", "/health")[0], 200)

    def test_only_some_are_kept_for_a_while_and_others_closed_at_once(self):
        self.hasten(MAX_REFUSED_CONNECTIONS=2, LINGERING_CLOSE_TIMEOUT=0.2)
        self.refuse_threads()
        silent = [self.connect() for _ in range(5)]
        responses = [connection.recv(12) for connection in silent]
        self.assertEqual(responses.count(b"HTTP/1.1 503"), 2)
        until(lambda: not self.server.connections)  # although none of the clients has closed

    def test_a_stop_closes_them(self):
        self.refuse_threads()
        silent = self.connect()
        self.assertEqual(silent.recv(12), b"HTTP/1.1 503")
        self.server.close()
        self.assertEqual(self.server.connections, set())

    def test_kernel_probes_whether_silent_clients_are_still_there(self):
        self.park()
        (connection,) = self.server.connections
        self.assertTrue(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        if hasattr(socket, "TCP_KEEPIDLE"):
            idle = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            self.assertEqual(idle, linger.PROBE_AFTER)


class ConnectionThreadsTest(ServerTest):
    """Threads that serve one connection after another."""

    def setUp(self):
        super().setUp()
        self.used = []
        run = linger.Connection.run

        def note_thread(connection):
            self.used.append(threading.get_ident())
            run(connection)

        noting = unittest.mock.patch.object(linger.Connection, "run", note_thread)
        self.addCleanup(noting.stop)
        noting.start()

    def alive(self):
        return sys._current_frames().keys() & set(self.used)

    def serve_together(self, count):
        """Serves so many connections at a time, of which each needs a thread."""
        connections = [self.connect() for _ in range(count)]
        until(lambda: len(self.server.active) == count)
        for connection in connections:
            connection.close()
        until(lambda: not self.server.connections)

    def test_a_thread_that_has_served_a_connection_serves_the_next(self):
        for _ in range(5):
            self.assertEqual(self.call("GET", "/health")[0], 200)
            until(lambda: self.server._connection_threads._idle)
        self.assertEqual((len(self.used), len(set(self.used))), (5, 1))

    def test_few_of_them_wait(self):
        with unittest.mock.patch.object(linger, "MAX_IDLE_THREADS", 2):
            for count in (1, 2, 10):
                self.serve_together(count)
                until(
                    lambda count=count: len(self.server._connection_threads._idle) == min(count, 2)
                )
        self.assertEqual(len(set(self.used)), 10)

    def test_a_stop_ends_those_that_wait_and_those_that_serve(self):
        self.serve_together(3)
        idle = self.connect()
        until(lambda: len(self.alive()) == 3 and self.server.active)
        self.server.close()
        until(lambda: not self.alive())
        self.assertEqual(idle.recv(1), b"")


class WaitingCapTest(ServerTest):
    options = types.MappingProxyType({"max_waiting": 2})

    def test_consumers_beyond_the_limit_get_503_and_the_others_go_on(self):
        kept = [self.park() for _ in range(2)]
        status, headers, body = self.call("GET", "/channels/q")
        self.assertEqual((status, headers["Retry-After"]), (503, "1"))
        self.assertIn("2 consumers are waiting", json.loads(body)["error"])
        self.assertEqual(self.call("GET", "/channels/q?nowait")[0], 204)
        for connection in kept:
            self.call("POST", "/channels/q", "x")
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 200 "))
        self.park()

    def test_by_default_a_quarter_of_the_connections_is_not_for_waiting(self):
        with linger.serve(max_connections=100) as server:
            self.assertEqual(server.max_waiting, 75)
        with linger.serve(max_connections=1) as server:
            self.assertEqual(server.max_waiting, 1)


class BudgetTest(unittest.TestCase):
    def setUp(self):
        self.budget = linger.MemoryBudget(1_000_000)

    def test_large_amounts_leave_a_share_for_small_ones(self):
        self.budget.reserve(700_000)
        with self.assertRaises(linger.Unavailable):
            self.budget.reserve(100_000)
        self.assertEqual(self.budget.used, 700_000)
        for _ in range(5):
            self.budget.reserve(60_000)
        with self.assertRaises(linger.Unavailable):
            self.budget.reserve(10)
        self.budget.force(0, 600_000)
        self.budget.reserve(100_000)
        self.assertEqual(self.budget.used, 500_000)

    def test_one_amount_alone_may_be_of_any_size(self):
        self.budget.reserve(5_000_000)
        self.budget.reserve(6_000_000, kept=5_000_000)
        with self.assertRaises(linger.Unavailable):
            self.budget.reserve(1)
        self.assertEqual(self.budget.room(), 1)

    def test_clients_without_a_known_token_have_the_smallest_share(self):
        self.budget.reserve(50_000)
        with self.assertRaises(linger.Unavailable):
            self.budget.reserve(20_000, linger.ANONYMOUS_SHARE)
        self.budget.reserve(20_000)

    def test_what_cannot_be_refused_is_counted_beyond_the_limit(self):
        self.budget.force(3_000_000)
        self.assertEqual(self.budget.used, 3_000_000)

    def test_a_reservation_follows_what_is_kept(self):
        reservation = linger.Reservation(self.budget)
        for size, counted in ((linger.UNCOUNTED, 0), (300_000, 300_000), (9_000, 9_000)):
            reservation.resize(size)
            self.assertEqual((reservation.size, self.budget.used), (counted, counted))
        self.budget.reserve(700_000)
        with self.assertRaises(linger.Unavailable):
            reservation.resize(200_000)
        self.assertEqual(reservation.size, 9_000)
        self.assertEqual(reservation.room(), 750_000 - 700_000)
        reservation.release()
        self.assertEqual((reservation.size, self.budget.used), (0, 700_000))

    def test_free_memory_goes_back_to_the_system_once_half_of_it_is_free(self):
        trimmed = threading.Semaphore(0)
        with unittest.mock.patch.object(linger, "trim_memory", trimmed.release):
            self.budget.force(linger.MIN_TRIM)
            self.budget.force(0, linger.MIN_TRIM // 2 - 1)
            self.assertFalse(trimmed.acquire(blocking=False))
            self.budget.force(0, 1)
            self.assertTrue(trimmed.acquire(timeout=PATIENCE))

    def test_the_defaults_follow_the_memory_of_the_machine_or_its_control_group(self):
        files = {
            "/proc/self/cgroup": "4:cpu,memory:/box/part\n0::/box/part\n",
            "/sys/fs/cgroup/memory.max": "max\n",
            "/sys/fs/cgroup/box/memory.max": "512000000\n",
            "/sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9223372036854771712\n",
        }

        def fake(path, *_, **__):
            if path not in files:
                raise FileNotFoundError(path)
            return io.StringIO(files[path])

        with unittest.mock.patch("builtins.open", fake):
            with unittest.mock.patch("os.sysconf", lambda name: 2_000_000):
                self.assertEqual(linger.machine_memory(), 512_000_000)
                self.assertEqual(linger.default_max_memory(), 128_000_000)
                self.assertEqual(linger.default_max_connections(), 3_906)
                del files["/sys/fs/cgroup/box/memory.max"]
                self.assertEqual(linger.default_max_memory(), 1_000_000_000)
                self.assertEqual(linger.default_max_connections(), linger.MAX_CONNECTIONS)
            with unittest.mock.patch("os.sysconf", side_effect=ValueError):
                self.assertGreaterEqual(linger.default_max_memory(), 1_000_000_000)


class JsonArrayTest(unittest.TestCase):
    def test_a_message_without_optional_fields_has_the_same_json(self):
        message = linger.Message(1, '"ä', -2, 30, 4, 5, 6, 7, "t\n", 8, "text/\\", b"\0%s\xc3\xa4")
        for field in ("body", *linger.OPTIONAL_KEYS):
            number = type(getattr(message, field.replace("-", "_"))) is int
            value = 1 if number else b"\xff" if field == "body" else f"{linger.OWN_HEADER}a: b\r\n"
            for each in (message, message._replace(**{field.replace("-", "_"): value})):
                expected = linger.TO_JSON(linger.message_object(each))
                self.assertEqual(linger.message_json(each), expected)

    def test_short_messages_are_turned_into_json_in_parts_of_a_bounded_size(self):
        plain = linger.Message(1, "c", 0, 30, 0, 1, 0, 0, "", 1, "text/plain", b"\1" * 4_000)
        messages = [plain] * 9 + [plain._replace(body=b"x" * 9_000)] * 2 + [plain] * 2
        array = linger.JsonArray(zip(messages), linger.message_json)
        sizes = [len(part) if isinstance(part, bytes) else 0 for part in array._parts]
        largest = linger.SMALL_AMOUNT + len(linger.message_json(plain))
        self.assertTrue(0 < max(sizes) <= largest, sizes)
        self.assertEqual(len(sizes), 3 + 2 + 1)  # of 3 messages each, the two long ones, the last
        expected = linger.json_response([linger.message_object(m) for m in messages]).body
        self.assertEqual(b"".join(array.pieces()), expected)
        self.assertEqual(array.length, len(expected))

    def test_its_length_is_known_before_it_is_built(self):
        message = linger.Message(1, "c", 0, 30, 0, 1, 0, 0, "", 1, "text/plain", b"")
        every = "".join(map(chr, range(0x800))).encode()
        bodies = (b"", b"x" * 9_000, every * 5, bytes(range(256)) * 30, b"\xff" * 9_001, b"\xff")
        for count in range(len(bodies) + 1):
            messages = [message._replace(body=body) for body in bodies[:count]]
            array = linger.JsonArray(zip(messages), linger.message_json)
            text = b"".join(array.pieces())
            objects = [linger.message_object(m) for m in messages]
            self.assertEqual(text, linger.json_response(objects).body)
            self.assertEqual(len(text), array.length)


class MemoryTest(ServerTest):
    """Each kind of bytes that clients make a server keep."""

    LARGE = POST + b"Content-Length: 200000\r\n\r\n"
    HEAD = b"GET / HTTP/1.1\r\n" + b"x: %s\r\n" % (b"x" * 8_000) * 7
    options = types.MappingProxyType({"max_memory": 400_000})

    def setUp(self):
        super().setUp()
        self.memory = self.server.memory

    def fill(self, count, size, channel="q"):
        for _ in range(count):
            self.broker.post(channel, b"x" * size)

    def deaf(self, request):
        """A connection whose client asks and does not read."""
        connection = socket.socket()
        self.addCleanup(connection.close)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.settimeout(PATIENCE)
        connection.connect(self.address)
        connection.sendall(request)
        return connection

    def check_small_ones_pass(self):
        id = self.broker.post("small", b"a").id
        self.broker.post("small", b"b")
        self.assertEqual(self.call("GET", "/channels/small")[0], 200)
        self.assertEqual(self.call("DELETE", f"/messages/{id}")[0], 204)
        self.assertEqual(self.call("POST", "/channels/small", b"c" * 1_000)[0], 202)

    def check_refused(self, answer):
        self.assertTrue(answer.startswith(b"HTTP/1.1 503 "), answer[:200])
        self.assertIn(b"\r\nRetry-After: 1\r\n", answer)
        self.assertIn(b"the server is short of memory", answer)

    def test_large_bodies_are_bounded_together_and_small_ones_pass(self):
        slow = self.connect()
        slow.sendall(self.LARGE + b"x" * 190_000)
        until(lambda: self.memory.used > 180_000)
        for request in (
            self.LARGE + b"x" * 200_000,
            CHUNKED + b"10000\r\n%s\r\n" % (b"x" * 65_536) * 3 + b"0\r\n\r\n",
        ):
            self.check_refused(self.talk(request))
        self.check_small_ones_pass()
        slow.sendall(b"x" * 10_000)
        self.assertTrue(slow.recv(1000).startswith(b"HTTP/1.1 202 "))
        until(lambda: not self.memory.used)  # it is given back once the answer is sent
        self.assertEqual(self.statuses(self.LARGE + b"x" * 200_000), [202])
        until(lambda: not self.memory.used)

    def test_an_aborted_body_frees_its_bytes(self):
        connection = self.connect()
        connection.sendall(self.LARGE + b"x" * 100_000)
        until(lambda: self.memory.used > 90_000)
        connection.close()
        until(lambda: not self.server.connections)
        self.assertEqual(self.memory.used, 0)

    def test_unfinished_heads_get_a_small_share_and_bodies_more(self):
        first = self.connect()
        first.sendall(self.HEAD[:20_000])
        until(lambda: self.memory.used == 20_000)
        self.check_refused(self.talk(self.HEAD, half_close=False))
        self.assertEqual(self.statuses(self.LARGE + b"x" * 200_000), [202])
        self.check_small_ones_pass()
        first.close()
        until(lambda: not self.memory.used)
        self.assertEqual(self.statuses(self.HEAD + b"Host: x\r\n\r\n"), [200])

    def test_queued_bodies_count_until_they_are_committed(self):
        committing, go_on = threading.Event(), threading.Event()
        transact = self.broker._store.transact

        def slow(batch):
            committing.set()
            go_on.wait(PATIENCE)
            return transact(batch)

        self.addCleanup(go_on.set)
        with unittest.mock.patch.object(self.broker._store, "transact", slow):
            request = self.LARGE + b"x" * 200_000
            posted = self.thread(self.statuses, request)
            self.assertTrue(committing.wait(PATIENCE))
            self.assertGreaterEqual(self.memory.used, 200_000)
            self.check_refused(self.talk(request))
            batch = json.dumps([{"body": "y"}] * 80).encode()
            headers = {"Content-Type": "application/json"}
            status, _, body = self.call("POST", "/channels/q/batch", batch, headers)
            self.assertEqual((status, b"short of memory" in body), (503, True))
            go_on.set()
        self.assertEqual(posted.result(PATIENCE), [202])
        self.assertEqual(self.call("POST", "/channels/q/batch", batch, headers)[0], 202)
        until(lambda: not self.memory.used)

    def test_messages_that_a_client_does_not_read_count_until_they_are_sent(self):
        body = "é" * 20_000_000
        self.allow_messages_of(100_000_000)
        self.broker.post("large", body.encode())
        self.allow_messages_of(256_000)
        self.fill(2, 100_000)
        request = b"GET /channels/large?nowait HTTP/1.1\r\nHost: x\r\n\r\n"
        deaf = self.deaf(request)
        until(lambda: self.memory.used)
        status, _, text = self.call("GET", "/channels/q?nowait")
        self.assertEqual((status, b"short of memory" in text), (503, True))
        self.assertEqual(self.broker.info("q")["ready"], 2)
        self.check_small_ones_pass()
        deaf.close()
        until(lambda: not self.memory.used)
        until(lambda: self.broker.info("large")["ready"] == 1)
        self.assertEqual(self.broker.read_message(1)[0].delivered, 0)
        self.assertEqual(self.call("GET", "/channels/q?nowait")[0], 200)

    def test_a_batch_takes_no_more_than_there_is_room_for(self):
        self.fill(8, 100_000)
        for query in ("", "&auto"):
            with self.subTest(query):
                status, headers, text = self.call("GET", f"/channels/q?n=8&nowait{query}")
                self.assertEqual(status, 200)
                taken = json.loads(text)
                self.assertEqual(len(taken), 2 if query else 3)
                self.assertEqual(taken[0]["body"], "x" * 100_000)
                self.assertEqual(int(headers["Content-Length"]), len(text))
            until(lambda: not self.memory.used)
        self.assertEqual(self.broker.info("q")["ready"], 3)
        until(lambda: not self.memory.used)

    def test_a_short_batch_may_be_long_in_json(self):
        for _ in range(15):
            self.broker.post("q", b"\x01" * 2_000)
        text = self.call("GET", "/channels/q?n=15&nowait")[2]
        self.assertGreater(len(text), 2 * linger.SMALL_AMOUNT)
        self.assertEqual([m["body"] for m in json.loads(text)], ["\x01" * 2_000] * 15)

    def test_a_batch_for_which_there_is_no_room_is_not_taken(self):
        self.fill(2, 100_000)
        self.memory.reserve(300_000)
        for query in ("?n=2&nowait", "?n=2&auto&nowait", "?nowait", "?auto&nowait"):
            with self.subTest(query):
                status, _, text = self.call("GET", "/channels/q" + query)
                self.assertEqual((status, b"short of memory" in text), (503, True))
                info = self.broker.info("q")
                self.assertEqual((info["ready"], info["in-flight"]), (2, 0))
        stats = self.broker.stats()
        self.assertEqual((stats["delivered"], stats["msg-hide"], stats["msg-delete"]), (0, 0, 0))
        for id in (1, 2):
            message, _ = self.broker.read_message(id)
            self.assertEqual((message.delivered, len(message.body)), (0, 100_000))

    def test_an_ack_holds_when_there_is_no_room_for_the_next_message(self):
        self.fill(2, 100_000)
        self.memory.reserve(300_000)
        self.assertEqual(self.call("GET", "/channels/q?ack=1&nowait")[0], 204)
        self.assertEqual(self.broker.info("q")["ready"], 1)

    def test_a_waiting_consumer_is_told_that_there_is_no_room(self):
        parked = self.park()
        self.memory.reserve(300_000)
        self.fill(1, 100_000)
        self.check_refused(parked.recv(4_096))
        self.assertEqual(self.broker.info("q")["ready"], 1)

    def test_listings_that_clients_do_not_read_are_bounded_and_undisturbed(self):
        self.allow_messages_of(2_000_000)
        body = b"\x01" * 2_000_000  # six times as long in JSON
        for _ in range(2):
            self.broker.post("q", body)
        request = b"GET /channels/q/messages?whole=1&n=2 HTTP/1.1\r\nHost: x\r\n\r\n"
        deaf = self.deaf(request)
        until(lambda: self.memory.used)
        again = request.replace(b"Host: x", b"Host: x\r\nConnection: close")
        self.check_refused(self.talk(again, half_close=False))
        self.check_small_ones_pass()
        received = bytearray()
        while not received.endswith(b"]\n"):
            received += deaf.recv(1_000_000)
        head, _, text = bytes(received).partition(b"\r\n\r\n")
        self.assertIn(b"Content-Length: %d\r\n" % len(text), head + b"\r\n")
        self.assertEqual([m["body"].encode() for m in json.loads(text)], [body, body])
        until(lambda: not self.memory.used)

    def test_other_responses_count_while_they_are_sent(self):
        self.fill(1, 100_000)
        self.memory.reserve(300_000)
        for path in ("/messages/1", "/backup"):
            with self.subTest(path):
                status, _, text = self.call("GET", path)
                self.assertEqual((status, b"short of memory" in text), (503, True))
        self.memory.force(0, 300_000)
        self.assertEqual(len(self.call("GET", "/messages/1")[2]), 100_000)
        self.assertEqual(self.call("HEAD", "/messages/1")[2], b"")
        self.assertEqual(self.call("GET", "/backup")[2][:6], b"SQLite")
        until(lambda: not self.memory.used)

    def test_small_operations_do_not_wait_for_all_large_ones(self):
        batches = []
        transact = self.broker._store.transact

        def record(batch):
            batches.append([operation.size for operation in batch])
            return transact(batch)

        large, small = linger.Operation(), linger.Operation()
        large.size, small.size = 5_000_000, 1
        operations = [large, small] * 3
        left = linger._take_large(operations)
        self.assertEqual([operation.size for operation in operations], [5_000_000, 1, 1, 1])
        self.assertEqual([operation.size for operation in left], [5_000_000, 5_000_000])
        with unittest.mock.patch.object(self.broker._store, "transact", record):
            for size in (5_000_000, 5_000_000, 1):
                operation = linger.Operation()
                operation.size = size
                self.broker._committer.submit(operation)
            self.broker._committer.run(linger.Operation())
            until(lambda: sum(batch.count(5_000_000) for batch in batches) == 2)
        self.assertTrue(all(batch.count(5_000_000) <= 1 for batch in batches), batches)


class HygieneTest(ServerTest):
    def test_every_response_forbids_type_sniffing(self):
        self.broker.post("q", b"x")
        for request in (
            CALL,
            b"GET /no" + HOST + b"\r\n",
            b"nonsense\r\n\r\n",
            b"OPTIONS *" + HOST + b"\r\n",
            b"GET /channels/q" + HOST + b"\r\n",
            b"GET /channels/empty?nowait" + HOST + b"\r\n",
        ):
            self.assertIn(b"\r\nX-Content-Type-Options: nosniff\r\n", self.talk(request))

    def test_no_message_is_run_by_a_browser_as_a_page_of_this_server(self):
        for type in ("text/html", "TEXT/HTML; charset=x", "image/svg+xml", "text/xml", "a/b"):
            id = self.broker.post("q", b"<script>alert(1)</script>", type).id
            for path in ("/channels/q", f"/messages/{id}"):
                status, headers, _ = self.call("GET", path)
                self.assertEqual((status, headers["Content-Type"]), (200, type))
                self.assertEqual(headers["Content-Security-Policy"], "sandbox")
                self.assertEqual(headers["X-Content-Type-Options"], "nosniff")

    def test_listings_and_errors_are_json_whatever_is_in_them(self):
        self.broker.post("<b>", b"<script>", "text/html")
        for path in ("/channels", "/channels/%3Cb%3E/messages", "/channels/<b>?n=<b>", "/<b>"):
            self.assertEqual(self.call("GET", path)[1]["Content-Type"], "application/json")

    def test_every_request_is_one_line_of_the_log_whatever_is_in_it(self):
        self.server.log_requests = True
        with contextlib.redirect_stderr(io.StringIO()) as log:
            for request in (
                b"GET /topics/\xc2\x85\xff?\\n" + HOST + b"\r\n",
                b"GET /topics?%0a%0d%1b[31m" + HOST + b"A: \xc2\x85\r\n\r\n",
                b"GET /x\x1b[31m\nfaked" + HOST + b"\r\n",
                b"\x1b[31m\r\n\r\n",
            ):
                self.talk(request)
        lines = log.getvalue().split("\n")
        self.assertEqual(
            [re.sub(r"^[0-9T:.-]+Z|[0-9.]+ ms$", "*", line) for line in lines],
            [
                "* 127.0.0.1 - GET /topics/\\xc2\\x85\\xff?\\n 405 *",
                "* 127.0.0.1 - GET /topics?%0a%0d%1b[31m 200 *",
                "* 127.0.0.1 - - - 400 *",
                "* 127.0.0.1 - - - 400 *",
                "",
            ],
        )
        self.assertTrue(log.getvalue().isascii())


class LongPollTest(ServerTest):
    """Consumers that wait over HTTP, and those that have gone."""

    def test_a_waiting_get_is_answered_by_a_post(self):
        connection = self.park()
        self.call("POST", "/channels/q", "hello")
        self.assertTrue(connection.recv(1000).endswith(b"\r\n\r\nhello"))

    def test_a_waiting_get_ends_with_204_and_the_connection_goes_on(self):
        self.hasten(DEFAULT_WAIT=0.1)
        connection = self.connect()
        connection.sendall(b"GET /channels/q HTTP/1.1\r\nHost: x\r\n\r\n" + CALL)
        answers = b""
        while b"200 OK" not in answers:
            answers += connection.recv(1000)
        self.assertTrue(answers.startswith(b"HTTP/1.1 204 "))

    def test_clients_that_hung_up_get_no_message(self):
        dead = [self.park() for _ in range(20)]
        live = self.park()
        for n, connection in enumerate(dead):
            if n % 2:  # reset rather than close
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
        self.broker.post("q", b"x")
        answer = live.recv(1000)
        self.assertIn(b"x-linger-delivered: 1\r\n", answer)
        self.assertIn(b"x-linger-lease: 1\r\n", answer)

    def test_a_client_that_hangs_up_after_it_was_woken_gets_no_message_either(self):
        connection, real = self.park(), linger.PlainStream.is_disconnected

        def hang_up(stream):
            found = real(stream)
            connection.close()
            return found

        with unittest.mock.patch.object(linger.PlainStream, "is_disconnected", hang_up):
            self.broker.post("q", b"x")
            until(lambda: not self.server.connections)
        message = self.broker.get("q")
        self.assertEqual((message.body, message.delivered), (b"x", 1))

    def test_a_client_that_hung_up_behind_a_second_request_is_dropped(self):
        self.hasten(DISCONNECT_CHECK_INTERVAL=0.01)
        connection = self.park()
        connection.sendall(CALL)
        self.await_read()
        connection.close()
        until(lambda: not count_waiting(self.broker) and not self.server.connections)

    def half_closed(self, line, before=lambda: None):
        """What a client reads that closes its sending side after `line` once `before` is done."""
        connection = self.connect()
        connection.sendall(line + HOST + b"\r\n")
        before()
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(1000):
            answer += data
        return answer

    def test_a_half_closed_client_is_served_what_is_there(self):
        self.broker.post("q", b"hello")
        self.assertTrue(self.half_closed(b"GET /channels/q").endswith(b"\r\n\r\nhello"))

    def test_a_half_closed_client_that_waits_gets_204_at_once(self):
        for before in (lambda: None, lambda: until(lambda: count_waiting(self.broker) == 1)):
            answer = self.half_closed(b"GET /channels/q?wait=3600", before)
            self.assertTrue(answer.startswith(b"HTTP/1.1 204 "), answer)
            self.assertIn(b"\r\nConnection: close\r\n", answer)
            self.assertEqual(count_waiting(self.broker), 0)

    def test_a_client_that_half_closes_after_it_was_woken_gets_204_and_no_message(self):
        connection, real = self.park(), linger.PlainStream.is_disconnected

        def half_close(stream):
            found = real(stream)
            connection.shutdown(socket.SHUT_WR)
            return found

        with unittest.mock.patch.object(linger.PlainStream, "is_disconnected", half_close):
            self.broker.post("q", b"x")
            answer = connection.recv(1000)
        self.assertTrue(answer.startswith(b"HTTP/1.1 204 "), answer)
        self.assertEqual(self.broker.get("q").delivered, 1)

    def test_a_thread_that_is_late_does_not_close_before_the_204_is_sent(self):
        """It comes round only when the reply to its request has begun to close the connection."""
        real, disconnected = linger.Connection._serve_request, linger.PlainStream.is_disconnected

        def serve_late(connection):
            real(connection)
            until(lambda: connection._closing)

        def half_close(stream):
            found = disconnected(stream)
            client.shutdown(socket.SHUT_WR)
            return found

        with (
            unittest.mock.patch.object(linger.Connection, "_serve_request", serve_late),
            unittest.mock.patch.object(linger.PlainStream, "is_disconnected", half_close),
        ):
            client = self.park()
            self.broker.post("q", b"x")
            answer = client.recv(1000)
        self.assertTrue(answer.startswith(b"HTTP/1.1 204 "), answer)

    def test_a_large_message_goes_to_a_client_that_is_slow_to_read_it(self):
        body = b"x" * linger.MAX_MESSAGE
        connection = self.connect_narrowly()
        connection.sendall(b"GET /channels/q HTTP/1.1\r\nHost: x\r\n\r\n" + CALL)
        until(lambda: count_waiting(self.broker, "q"))
        self.broker.post("q", body)
        self.broker.post("other", b"meanwhile")
        answers = b""
        while not answers.endswith(b"}\n"):
            answers += connection.recv(10_000)
        self.assertIn(b"\r\n\r\n" + body + b"HTTP/1.1 200 OK\r\n", answers)

    def test_clients_that_hung_up_are_dropped_although_no_message_arrives(self):
        for connection in [self.park() for _ in range(20)]:
            connection.close()
        until(lambda: not count_waiting(self.broker) and not self.server.connections)

    def test_a_delivery_that_cannot_be_sent_is_undone(self):
        self.broker.post("q", b"x")
        real = linger.message_headers

        def break_connection(*arguments):
            next(iter(self.server.connections)).shutdown(socket.SHUT_RDWR)
            return real(*arguments)

        with unittest.mock.patch.object(linger, "message_headers", break_connection):
            self.talk(b"GET /channels/q HTTP/1.1\r\nHost: x\r\n\r\n", half_close=False)
        until(lambda: self.broker.channel_stats("q") == {"ready": 1, "hidden": 0})
        self.assertEqual(self.broker.get("q").delivered, 1)

    def test_a_thousand_waiting_consumers_delay_no_other_request(self):
        connections = []
        for _ in range(1000):
            connection = self.connect()
            connection.sendall(b"GET /channels/q HTTP/1.1\r\nHost: x\r\n\r\n")
            connections.append(connection)
        until(lambda: count_waiting(self.broker, "q") == 1000)
        start = time.monotonic()
        self.assertEqual(self.call("GET", "/topics")[0], 200)
        self.assertLess(time.monotonic() - start, 1)
        for _ in range(3):
            self.broker.post("q", b"x")
        poller = select.poll()
        for connection in connections:
            poller.register(connection, select.POLLIN)
        until(lambda: len(poller.poll(0)) == 3)
        for connection in connections:
            connection.close()
        until(lambda: not self.server.connections)

    def test_a_client_that_reads_too_slowly_is_disconnected_and_the_delivery_undone(self):
        self.allow_messages_of(20_000_000)
        self.broker.post("q", b"x" * 20_000_000)
        with unittest.mock.patch.object(linger, "SEND_TIMEOUT", 1):
            connection = self.connect()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10_000)
            connection.sendall(b"GET /channels/q" + HOST + b"\r\n")
            until(lambda: self.server.active)
            while self.server.active:
                connection.recv(100)
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 0})

    def test_a_stop_ends_waiting_gets_with_204(self):
        waiting, idle = self.park(), self.connect()
        idle.sendall(CALL)
        idle.recv(1000)
        start = time.monotonic()
        self.server.close()
        self.assertLess(time.monotonic() - start, linger.STOP_TIMEOUT)
        answer = waiting.recv(1000)
        self.assertTrue(answer.startswith(b"HTTP/1.1 204 "))
        self.assertIn(b"\r\nConnection: close\r\n", answer)
        self.assertEqual((waiting.recv(1), idle.recv(1)), (b"", b""))


class ProxyCase(ServerTest):
    """A server behind a proxy, which has the configuration of README.md but for TLS and ports."""

    NAME = ""  # of the program
    SECTION = "Reverse proxies"  # of README.md
    HOST = types.MappingProxyType({"Host": "queue.example.com"})
    options = types.MappingProxyType({"allow_host": "queue.example.com"})

    @classmethod
    def setUpClass(cls):
        places = os.pathsep.join(
            (os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin")
        )
        cls.program = shutil.which(cls.NAME, path=places)
        if cls.program is None:
            raise unittest.SkipTest(f"{cls.NAME or 'a proxy'} is not installed")

    def setUp(self):
        super().setUp()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.front = free.getsockname()[1]
        readme = (HERE / "README.md").read_text()
        section = readme.partition(f"### {self.SECTION}\n")[2].partition("\n### ")[0]
        blocks = re.findall(r"(?:^(?:    .*)?\n)+", section, re.MULTILINE)
        marker = {"nginx": "proxy_pass", "caddy": "reverse_proxy", "haproxy": "backend"}[self.NAME]
        (block,) = (textwrap.dedent(block) for block in blocks if marker in block)
        servers = self.servers(section).items()
        block = self.replace(block, *((f":{old}", f":{new}") for old, new in servers))
        config = self.folder / "proxy.conf"
        config.write_text(self.configure(block))
        stderr = self.folder / "stderr"
        with stderr.open("wb") as file:
            proxy = subprocess.Popen(
                [self.program, *self.arguments(str(config))],
                env={**os.environ, "HOME": str(self.folder), "XDG_DATA_HOME": str(self.folder)},
                stdout=subprocess.DEVNULL,
                stderr=file,
            )
        self.addCleanup(proxy.wait)
        self.addCleanup(proxy.terminate)
        until(lambda: proxy.poll() is not None or self.is_up())
        self.assertIsNone(proxy.poll(), stderr.read_text())
        self.address = ("127.0.0.1", self.front)

    def servers(self, section):
        """The ports in the configuration, and those of the servers that run."""
        return {8989: self.address[1]}

    def is_up(self):
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self.front), PATIENCE).close()
            return True
        return False

    def arguments(self, config):
        raise NotImplementedError

    def configure(self, block):
        raise NotImplementedError

    def replace(self, block, *pairs):
        for old, new in pairs:
            self.assertEqual(block.count(old), 1, old)
            block = block.replace(old, new)
        return block

    def call(self, method, path, body=None, headers=None):
        return super().call(method, path, body, {**self.HOST, **(headers or {})})


class EachProxy:
    """The tests that each proxy passes."""

    def test_it_passes_all_that_linger_sends(self):
        """A long reason, many channels, large bodies, and names that must not be touched."""
        reason = 'File "/opt/jobs/do.py", line 10, in <module>\n' * 90
        id = json.loads(self.call("POST", "/channels/jobs?delay=0", b"work")[2])["id"]
        self.broker.get("jobs")
        self.assertEqual(self.call("POST", f"/messages/{id}/release", reason)[0], 204)
        status, headers, body = self.call("GET", "/channels/jobs?nowait")
        self.assertEqual((status, body, headers["x-linger-error-cut"]), (200, b"work", "true"))
        many = ",".join(f"%C3%BC{n}" * 9 for n in range(99))
        status, headers, _ = self.call("GET", f"/channels/{many}?nowait")
        self.assertEqual((status, headers["x-linger-channel-count"]), (204, "99"))
        for name in ("a%2Fb", "a%2520b", "%C3%BC%3F", "a%2Cb"):
            self.assertEqual(self.call("POST", f"/channels/{name}", b"x")[0], 202, name)
            channel = self.call("GET", f"/channels/{name}?nowait")[1]["x-linger-channel"]
            self.assertEqual(urllib.parse.unquote(channel), urllib.parse.unquote(name))
        body = bytes(range(256)) * 1000
        self.assertEqual(self.call("POST", "/channels/large", body)[0], 202)
        self.assertEqual(self.call("GET", "/channels/large")[2], body)
        line = b'"' + b"x" * 249_990 + b'"\n'
        kind = {"Content-Type": "application/x-ndjson"}
        status, _, body = self.call("POST", "/channels/large/batch", line * 31, kind)
        self.assertEqual((status, len(json.loads(body)["ids"])), (202, 31))
        self.assertEqual(self.call("POST", "/channels/large", b"x" * 256_001)[0], 413)

    def test_it_passes_on_who_waits_and_who_is_gone(self):
        """Long polls get messages; a client that hangs up gets none, and frees its place."""
        request = b"GET /channels/q HTTP/1.1\r\nHost: queue.example.com\r\n\r\n"
        for _ in range(2):
            gone = self.connect()
            gone.sendall(request)
            until(lambda: count_waiting(self.broker))
            gone.close()
            until(lambda: not count_waiting(self.broker))
        live = self.connect()
        live.sendall(request)
        until(lambda: count_waiting(self.broker))
        self.broker.post("q", b"hello")
        answer = b""
        while not answer.endswith(b"hello"):
            answer += live.recv(10_000)
        self.assertIn(b"x-linger-delivered: 1\r\n", answer.lower())

    def test_it_keeps_connections(self):
        """The proxy keeps its connections to the server, and the client's."""
        client = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        self.addCleanup(client.close)
        used = set()
        for _ in range(9):
            client.request("GET", "/topics", headers=self.HOST)
            self.assertEqual(client.getresponse().read(), b'{"topics":[]}\n')
            used |= {connection.getpeername() for connection in list(self.server.connections)}
        self.assertLess(len(used), 3)


class NginxCase(ProxyCase):
    NAME = "nginx"

    def arguments(self, config):
        return "-p", str(self.folder), "-c", config

    def configure(self, block):
        block = self.replace(
            block,
            ("listen 443 ssl;", f"listen 127.0.0.1:{self.front};"),
            ("    ssl_certificate /etc/ssl/queue.pem;\n", ""),
            ("    ssl_certificate_key /etc/ssl/queue.key;\n", ""),
        )
        paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        folders = " ".join(f"{name}_temp_path {self.folder}/{name};" for name in paths)
        return (
            f"daemon off; user root; pid {self.folder}/pid; error_log stderr;\n"
            f"events {{ }}\nhttp {{\naccess_log off; {folders}\n{block}}}\n"
        )


class NginxPathTest(NginxCase):
    """A server below a path of a proxy, on a Unix socket, with the configuration of README.md."""

    SECTION = "Unix socket, and below a path"

    def setUp(self):
        self.path = self.new_folder() / "linger.sock"
        self.options = {**self.options, "host": f"unix:{self.path}"}
        super().setUp()

    def servers(self, section):
        return {}

    def configure(self, block):
        return super().configure(self.replace(block, ("/run/linger/linger.sock", str(self.path))))

    def test_the_client_works_there(self):
        self.hasten(LISTENER_CHECK_INTERVAL=0.02)
        client = linger.Client(f"http://localhost:{self.front}/queue/", timeout=PATIENCE)
        self.addCleanup(client.close)
        for name in ("a/b", "a%20b", "ü?", "a,b"):
            client.post(name, "x")
            self.assertEqual(client.get([name, "other"], 0).channel, name)
        event = self.thread(next, client.live("q"))
        until(lambda: self.broker._state.live.channels)
        client.post("q", "y")
        self.assertEqual(event.result(PATIENCE).name, "posted")
        self.assertEqual(run_command(client.url, "get", "q"), (0, b"y", ""))
        with self.assertRaisesRegex(linger.LingerError, "responds with status 404"):
            linger.Client(f"http://localhost:{self.front}").stats()


class NginxTest(EachProxy, NginxCase):
    pass


class CaddyTest(EachProxy, ProxyCase):
    NAME = "caddy"

    def arguments(self, config):
        return "run", "--adapter", "caddyfile", "--config", config

    def configure(self, block):
        site = f"http://queue.example.com:{self.front} {{\n    bind 127.0.0.1"
        block = self.replace(block, ("queue.example.com {", site))
        return "{\n    admin off\n}\n" + block


class HaproxyCase(ProxyCase):
    NAME = "haproxy"

    def arguments(self, config):
        return "-db", "-f", config

    def configure(self, block):
        bind = "bind :443 ssl crt /etc/ssl/queue.pem"
        return self.replace(block, (bind, f"bind 127.0.0.1:{self.front}"))


class HaproxyTest(EachProxy, HaproxyCase):
    pass


class Shards:
    """Three servers behind a proxy, which chooses by the name of the channel, topic or message."""

    SECTION = "Shards: more throughput"

    def servers(self, section):
        ports = {}
        for number in range(3):
            path = str(self.folder / f"shard{number}.db")
            linger.Broker(linger.Store(path)).close()
            for text in re.findall(f'shard{number}.db "(.+)"', section):
                with contextlib.closing(sqlite3.connect(path)) as connection, connection:
                    connection.execute(text)
            server = linger.serve(dbfile=path, sync="off", allow_host=self.HOST["Host"])
            self.addCleanup(server.close)
            ports[8990 + number] = server.server_address[1]
        return ports

    def test_it_finds_the_shard_of_a_channel_a_topic_and_a_message(self):
        shards = set()
        for n in range(15):
            names = [f"f{n}", f"f{n}.mail", f"f{n}.failed"]
            posts = [self.call("POST", f"/channels/{name}", b"x")[2] for name in names]
            here = {json.loads(post)["id"] // 10**15 for post in posts}
            self.assertEqual(len(here), 1)
            shards |= here
            _, headers, _ = self.call("GET", f"/channels/f{n}.mail,f{n}.x?nowait")
            self.assertEqual(headers["x-linger-channel"], f"f{n}.mail")
            id, lease = headers["x-linger-msg-id"], headers["x-linger-lease"]
            self.assertEqual(self.call("DELETE", f"/messages/{id}?lease={lease}")[0], 204)
            self.assertEqual(self.call("PUT", f"/channels/f{n}/topics/f{n}.news")[0], 204)
            copies = json.loads(self.call("POST", f"/topics/f{n}.news", b"x")[2])
            self.assertEqual(list(copies), [f"f{n}"])
        self.assertEqual(shards, {0, 1, 2})


class NginxShardsTest(Shards, NginxCase):
    """With the configuration of README.md."""


class HaproxyShardsTest(Shards, HaproxyCase):
    """With the configuration of README.md."""


# -- access --------------------------------------------------------------------------------------


class RulesTest(Folder):
    """The file of tokens."""

    def write(self, text, mode=0o600):
        path = self.folder / "tokens"
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    def grant(self, line):
        (grant,) = linger.load_tokens(self.write(line)).values()
        return grant

    def test_a_line_gives_a_token_rights_for_the_names_that_its_patterns_match(self):
        grant = self.grant(
            "# who\n\n worker  T0ken read,write orders-* a[bc]? topic:news-*  # why\n"
        )
        self.assertEqual(grant.rights & set(linger.RIGHTS), {"read", "write"})
        names = [
            "orders-",
            "orders-1\n2",
            "Orders-1",
            "orders",
            "xorders-1",
            "abc",
            "a*c",
            "news-1",
        ]
        self.assertEqual(grant.visible("channels", names), ["orders-", "orders-1\n2", "abc"])
        self.assertEqual(grant.visible("topics", names), ["news-1"])

    def test_without_patterns_it_covers_all_and_with_one_kind_none_of_the_other(self):
        self.assertTrue(self.grant("w t read").covers("topics", "x"))
        self.assertFalse(self.grant("w t read *").covers("topics", "x"))
        self.assertFalse(self.grant("w t read topic:*").covers("channels", "topic:x"))
        full = self.grant("w t admin,write,read")
        self.assertEqual(full, linger.FULL_ACCESS._replace(token_name="w"))

    def test_a_token_may_be_written_as_its_sha256_which_is_no_token_itself(self):
        digest = hashlib.sha256(b"T0ken").hexdigest()
        access = linger.Access(tokens=self.write(f"w sha256:{digest.upper()} read\n"))
        self.assertIsNotNone(access.identify("Bearer T0ken"))
        self.assertIsNone(access.identify(f"Bearer sha256:{digest.upper()}"))

    def test_an_error_names_the_file_and_the_line_and_nothing_in_it(self):
        for text, line, said in (
            ("a s3cret read\nb s3cret2\n", 2, "name token rights"),
            ("a s3cret read\nb s3cret write\n", 2, "duplicate name or token"),
            ("a s3cret read\na s3cret2 write\n", 2, "duplicate name or token"),
            ("a s3cret read,s3cret\n", 1, "read, write, admin"),
            ("a s3cret read,\n", 1, "read, write, admin"),
            ("a s3crét read\n", 1, "visible ASCII"),
            ("a sha256:s3cret read\n", 1, "64 hexadecimal"),
            (f"a {'s3cret' * 200} read\n", 1, "1024"),
            ("a s3cret read" + " x" * 101, 1, "100 patterns"),
            ("a s3cret read " + "x" * 256, 1, "255 characters"),
        ):
            with self.subTest(text[:40]), self.assertRaises(linger.BadRequest) as caught:
                linger.load_tokens(self.write(text))
            self.assertRegex(str(caught.exception), f"/tokens, line {line}: .*{said}")
            self.assertNotIn("s3c", str(caught.exception))

    def test_a_file_without_tokens_or_unreadable_does_not_load(self):
        for text in ("", "# a s3cret read\n", "x" * (linger.MAX_TOKENS_FILE + 1)):
            with self.assertRaises(linger.BadRequest):
                linger.Access(tokens=self.write(text))
        Path(self.write("")).write_bytes(b"a \xff read\n")
        for name in ("tokens", "missing", ""):
            with self.assertRaisesRegex(linger.BadRequest, "cannot read"):
                linger.Access(tokens=name and str(self.folder / name))

    def test_a_file_that_others_can_read_is_logged(self):
        for mode, said in ((0o600, ""), (0o640, "chmod 600"), (0o604, "chmod 600")):
            with contextlib.redirect_stderr(io.StringIO()) as log:
                linger.Access(tokens=self.write("a s3cret read\n", mode))
            self.assertIn(said, log.getvalue())
            self.assertEqual(bool(said), bool(log.getvalue()))

    def test_a_broken_file_keeps_the_old_rules(self):
        access = linger.Access(tokens=self.write("a s3cret read\n"))
        self.write("b s3cret2\n")
        with self.assertRaises(linger.BadRequest):
            access.reload()
        self.assertIsNotNone(access.identify("Bearer s3cret"))
        self.write("b s3cret2 read\n")
        access.reload()
        self.assertIsNone(access.identify("Bearer s3cret"))

    def test_a_token_may_be_sent_in_several_ways_and_nothing_else_is_one(self):
        access = linger.Access(token="a:b")
        for value in (":a:b", "user:a:b"):
            basic = base64.b64encode(value.encode()).decode()
            self.assertIs(access.identify(f"Basic {basic}"), linger.FULL_ACCESS)
            self.assertIs(access.identify(f"bASIC  {basic} "), linger.FULL_ACCESS)
        self.assertIs(access.identify("BEARER a:b"), linger.FULL_ACCESS)
        for value in (
            None, "", "a:b", "Bearer", "Bearer ", "Bearer a:B", "Bearer a:b x", "Bearer\ta:b",
            "Basic", "Basic !!!", "Basic YQ", "Basic YTpi\xff", "Basic \xe4", "Bearer \xe4",
            "Digest a:b", "Basic " + base64.b64encode(b"a:b").decode(), "Basic Og==",
        ):  # fmt: skip
            self.assertIsNone(access.identify(value), value)

    def test_options_that_make_no_sense_are_refused(self):
        for options in (
            {"token": ""}, {"token": "a b"}, {"token": "ä"}, {"token": "x", "no_auth": True},
            {"cors": "a.example"}, {"cors": "https://a.example/x"}, {"cors": "https://a,"},
            {"allow_host": "a:80"}, {"allow_host": "*"}, {"key": "x"}, {"cert": "/nowhere"},
        ):  # fmt: skip
            with self.subTest(options), self.assertRaises(linger.BadRequest):
                linger.Access(**options)

    def test_only_loopback_has_access_without_tokens_unless_no_auth_is_given(self):
        for address in ("127.0.0.1", "127.3.2.1", "::1"):
            linger.Access().listen(address)
        for address in ("0.0.0.0", "::", "192.0.2.1", "fe80::1%eth0"):
            with self.assertRaisesRegex(linger.BadRequest, "--tokens.*--no-auth"):
                linger.Access().listen(address)
            linger.Access(token="x").listen(address)
            linger.Access(no_auth=True).listen(address)
        with self.assertRaises(linger.BadRequest):
            linger.serve("0.0.0.0")


class ThrottleTest(unittest.TestCase):
    def setUp(self):
        self.clock = FakeClock()
        self.throttle = linger.AuthThrottle(self.clock)

    def test_after_ten_wrong_tokens_in_a_minute_responses_are_delayed_until_it_is_over(self):
        delays = [self.throttle.record_failure("192.0.2.1") for _ in range(12)]
        self.assertEqual(delays, [0] * 10 + [linger.AUTH_FAILURE_DELAY] * 2)
        self.assertEqual(self.throttle.record_failure("192.0.2.2"), 0)
        self.clock.now += linger.AUTH_FAILURE_WINDOW
        self.assertEqual(self.throttle.record_failure("192.0.2.1"), 0)

    def test_an_ipv6_network_counts_as_one_client_and_each_mapped_address_too(self):
        delays = [self.throttle.record_failure(f"2001:db8::{n:x}") for n in range(11)]
        self.assertEqual(delays[-1], linger.AUTH_FAILURE_DELAY)
        self.assertEqual(self.throttle.record_failure("2001:db8:0:1::1"), 0)
        mapped = (f"::ffff:192.0.2.{n}" for n in range(20))
        self.assertEqual(set(map(self.throttle.record_failure, mapped)), {0})

    def test_the_client_that_failed_longest_ago_is_forgotten_when_there_are_too_many(self):
        for _ in range(linger.FREE_AUTH_FAILURES):
            self.throttle.record_failure("192.0.2.1")
        for n in range(linger.MAX_FAILING_ADDRESSES):
            self.throttle.record_failure(f"10.0.{n // 256}.{n % 256}")
        self.assertEqual(self.throttle.record_failure("192.0.2.1"), 0)


BEARER = types.MappingProxyType({"Authorization": "Bearer T0ken"})
TOKENS = """
boss   b0ss   read,write,admin
reader r3ad   read
writer wr1te  write
admin  adm1n  admin
figure f1gur  metrics
shop   sh0p   read,write,admin  orders-* topic:orders
"""


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


class TokenTest(ServerTest):
    """A server with a file of tokens."""

    def setUp(self):
        self.tokens = self.write_tokens(TOKENS)
        self.options = {"tokens": str(self.tokens)}
        super().setUp()

    def as_shop(self, method, path, body=None, headers=None):
        return self.json(method, path, body, {**bearer("sh0p"), **(headers or {})})

    def test_every_route_needs_its_right_and_no_other(self):
        tokens = {"read": "r3ad", "write": "wr1te", "admin": "adm1n", "metrics": "f1gur"}
        for route in linger.ROUTES:
            path = re.sub("<[a-z]+>", "7", route.path)
            for right, token in {**tokens, "": None, "all": "b0ss"}.items():
                with self.subTest(route=route.path, method=route.method, right=right):
                    query = "?nowait" if route.endpoint == "take_message" else ""
                    method = "HEAD" if path.endswith("/live") else route.method
                    shown = bearer(token) if token else {}
                    status, _, _ = self.call(method, path + query, None, shown)
                    if route.right == "":
                        self.assertEqual(status, 200)
                    elif right == "":
                        self.assertEqual(status, 401)
                    elif (
                        right in (route.right, "all")
                        or route.right == linger.AUTHENTICATED
                        or (right, route.right) == ("admin", "metrics")
                    ):
                        self.assertNotIn(status, (401, 403))
                    else:
                        self.assertEqual(status, 403)

    def test_a_stream_ends_when_its_token_loses_the_right(self):
        client = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        self.addCleanup(client.close)
        client.request("GET", "/channels/orders-1/live", headers=bearer("sh0p"))
        stream = client.getresponse()
        self.assertEqual(stream.readline(), b"retry: 1000\n")
        self.assertEqual(self.call("GET", "/channels/q/live", None, bearer("sh0p"))[0], 403)
        self.tokens.write_text(TOKENS.replace("orders-*", "other-*"))
        self.server.reload()
        self.broker.post("orders-1", b"secret")
        self.assertEqual(stream.read(), b"\n")
        until(lambda: not self.broker._state.live.channels)

    def test_only_health_is_served_without_a_token(self):
        for method, path in (("GET", "/nowhere"), ("PATCH", "/topics"), ("OPTIONS", "/health")):
            self.assertEqual(self.call(method, path)[0], 401)
        self.assertEqual(self.call("HEAD", "/health")[0], 200)
        self.assertEqual(self.call("GET", "/health", None, bearer("wrong"))[0], 200)

    def test_401_names_the_schemes_and_nothing_is_stored(self):
        status, headers, body = self.call("POST", "/channels/q", "x", bearer("wrong"))
        self.assertEqual(status, 401)
        challenges = headers.get_all("WWW-Authenticate")
        self.assertEqual([c.split()[0] for c in challenges], ["Bearer", "Basic"])
        _, others, other = self.call("POST", "/channels/q", "x")
        self.assertEqual((other, others.keys()), (body, headers.keys()))
        self.assertEqual(self.broker.channels(), [])

    def test_401_is_sent_before_the_body_and_leaves_no_request_behind(self):
        head = b"POST /channels/q HTTP/1.1\r\nHost: x\r\nContent-Length: "
        body = b"POST /channels/q HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
        answer = self.talk(head + b"100000\r\nExpect: 100-continue\r\n\r\n", half_close=False)
        self.assertTrue(answer.startswith(b"HTTP/1.1 401 "), answer)
        self.assertIn(b"\r\nConnection: close\r\n", answer)
        self.assertEqual(self.statuses(head + b"%d\r\n\r\n" % len(body) + body), [401])
        self.assertEqual(self.broker.channels(), [])

    def test_what_is_no_token_is_401_and_two_are_400(self):
        head = b"GET /topics HTTP/1.1\r\nHost: x\r\nAuthorization: "
        for value, status in (
            (b"Bearer b0ss", 200), (b"bearer b0ss", 200), (b"Basic dXNlcjpiMHNz", 200),
            (b"Bearer b0ss\r\nAuthorization: Bearer b0ss", 400), (b"Basic %%%", 401),
            (b"Bearer \xff\xfe", 401), (b"Basic \xff", 401), (b"", 401), (b"b0ss", 401),
        ):  # fmt: skip
            self.assertEqual(self.statuses(head + value + b"\r\n\r\n"), [status], value)

    def test_each_request_of_a_connection_is_judged_by_its_own_token(self):
        get = b"GET /topics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n"
        self.assertEqual(
            self.statuses(get % b"b0ss", get % b"wr1te", get % b"r3ad", get % b"r3ax"),
            [200, 403, 200, 401],
        )
        self.assertEqual(self.statuses(get % b"b0ss" + CALL), [200, 401])

    def test_reloaded_tokens_hold_from_the_next_request_of_an_open_connection(self):
        connection = self.connect()
        get = b"GET /topics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer r3ad\r\n\r\n"
        connection.sendall(get)
        self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 200 "))
        self.tokens.write_text("reader other read\n")
        with contextlib.redirect_stderr(io.StringIO()) as log:
            self.server.reload()
        self.assertRegex(log.getvalue(), "^linger: the files .* were read again\n$")
        connection.sendall(get)
        self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 401 "))

    def test_invalid_tokens_are_logged_and_the_old_ones_hold(self):
        self.tokens.write_text("reader r3ad\n")
        with contextlib.redirect_stderr(io.StringIO()) as log:
            self.server.reload()
        self.assertRegex(log.getvalue(), "^linger: .*tokens, line 1: .*still holds\n$")
        self.assertEqual(self.call("GET", "/topics", None, bearer("r3ad"))[0], 200)

    def test_responses_to_wrong_tokens_are_delayed_and_others_are_not(self):
        throttle = self.server.access.throttle
        throttle.slots = threading.BoundedSemaphore(1)

        def is_delaying():
            free = throttle.slots.acquire(blocking=False)
            if free:
                throttle.slots.release()
            return not free

        with unittest.mock.patch.object(linger, "AUTH_FAILURE_DELAY", PATIENCE):
            for _ in range(linger.FREE_AUTH_FAILURES):
                self.assertEqual(self.call("GET", "/topics", None, bearer("wrong"))[0], 401)
            delayed = self.connect()
            delayed.sendall(CALL[:-2] + b"Authorization: Bearer wrong\r\n\r\n")
            until(is_delaying)
            self.assertEqual(self.call("GET", "/topics", None, bearer("r3ad"))[0], 200)
            self.assertEqual(self.call("GET", "/topics")[0], 401)
            self.assertEqual(select.select([delayed], [], [], 0)[0], [])
            status, headers, _ = self.call("GET", "/topics", None, bearer("wrong"))
            self.assertEqual((status, headers["Retry-After"]), (429, "60"))

    def test_a_token_with_patterns_reaches_no_other_channel_or_topic(self):
        for method, path, status in (
            ("POST", "/channels/orders-1?msg=x", 202),
            ("POST", "/channels/other?msg=x", 403),
            ("POST", "/channels/%6frders-1?msg=x", 202),
            ("POST", "/channels/other%2Corders-1?msg=x", 403),
            ("GET", "/channels/orders-1?nowait", 200),
            ("GET", "/channels/orders-1,orders-2?nowait", 200),
            ("GET", "/channels/orders-1,other?nowait", 403),
            ("GET", "/channels/other,orders-1?nowait", 403),
            ("GET", "/channels/orders-1,?nowait", 403),
            ("HEAD", "/channels/other/stats", 403),
            ("GET", "/channels/other/messages", 403),
            ("PUT", "/channels/orders-1/topics/orders", 204),
            ("PUT", "/channels/orders-1/topics/other", 403),
            ("PUT", "/channels/other/topics/orders", 403),
            ("POST", "/topics/orders?msg=x", 202),
            ("POST", "/topics/orders-1?msg=x", 403),
            ("DELETE", "/channels/other", 403),
            ("GET", "/stats", 403),
        ):
            with self.subTest(method + " " + path):
                self.assertEqual(self.call(method, path, None, bearer("sh0p"))[0], status)
        self.assertEqual(self.broker.channel_stats("other"), {"ready": 0, "hidden": 0})

    def test_a_token_with_patterns_can_send_nothing_elsewhere(self):
        form, batch = FORM, {"Content-Type": "application/json"}
        for method, path, body, headers in (
            ("POST", "/channels/orders-1?dead=other", "x", {}),
            ("POST", "/channels/orders-1", "msg=x&dead=other", form),
            ("POST", "/channels/orders-1/batch?dead=other", '[{"body": "x"}]', batch),
            ("POST", "/channels/orders-1/batch", '[{"body": "x", "dead": "other"}]', batch),
            ("PUT", "/channels/orders-1/settings?dead=other", None, {}),
            ("PUT", "/channels/orders-1/topics/orders?dead=other", None, {}),
            ("PATCH", "/channels/orders-1/settings?dead=other", None, {}),
            ("POST", "/channels/orders-1/redrive?to=other", None, {}),
            ("POST", "/channels/orders-1/redrive", None, {}),
            ("POST", "/messages/1/redrive?to=other", None, {}),
            ("POST", "/messages/1/redrive", None, {}),
            ("PATCH", "/messages/1?dead=other", None, {}),
        ):
            with self.subTest(path=path, body=body):
                self.assertEqual(self.as_shop(method, path, body, headers)[0], 403)
        self.assertEqual(self.broker.channels(), [])
        for path in ("/channels/orders-1?dead=orders-2", "/channels/orders-1?dead="):
            self.assertEqual(self.as_shop("POST", path, "x")[0], 202)
        self.assertEqual(
            self.as_shop("POST", "/channels/orders-1/redrive?to=orders-2"), (200, {"moved": 2})
        )

    def test_an_id_alone_gives_no_access(self):
        foreign, own = self.broker.post("other", b"x").id, self.broker.post("orders-1", b"x").id
        self.broker.get("other")
        before = self.broker.read_message(foreign)
        for method, path in (
            ("GET", f"/messages/{foreign}"),
            ("DELETE", f"/messages/{foreign}"),
            ("DELETE", f"/messages/{foreign}?lease=1"),
            ("DELETE", f"/messages/{foreign}?lease=2"),
            ("POST", f"/messages/{foreign}/touch?timeout=900"),
            ("POST", f"/messages/{foreign}/release"),
            ("POST", f"/messages/{foreign}/reject"),
            ("POST", f"/messages/{foreign}/redrive?to=orders-2"),
            ("PATCH", f"/messages/{foreign}?priority=1"),
            ("GET", f"/channels/orders-1?nowait&ack={foreign}"),
            ("GET", f"/channels/orders-1?nowait&ack={foreign}&lease=1"),
            ("GET", f"/channels/orders-1/messages?state=ready&after={foreign}"),
        ):
            with self.subTest(method + " " + path):
                answer = self.as_shop(method, path)
                self.assertEqual(answer, (404, {"error": f"there is no message {foreign}"}))
                self.assertEqual(self.broker.read_message(foreign), before)
        self.assertEqual(
            self.as_shop(
                "POST", "/messages/delete", f'[{foreign}, {{"id": {own}, "lease": 0}}, 99]'
            ),
            (200, {"deleted": [own], "conflict": [], "missing": [foreign, 99]}),
        )
        self.assertEqual(self.broker.read_message(foreign), before)

    def test_a_token_with_patterns_handles_its_own_messages_like_any_other(self):
        for _ in range(3):
            self.broker.post("orders-1", b"x")
        self.assertEqual(self.call("GET", "/channels/orders-1", None, bearer("sh0p"))[0], 200)
        for method, path, status in (
            ("GET", "/messages/1", 200),
            ("POST", "/messages/1/touch?lease=1", 204),
            ("POST", "/messages/1/release?lease=2", 409),
            ("POST", "/messages/1/release?lease=1", 204),
            ("POST", "/messages/1/touch", 409),
            ("DELETE", "/messages/1", 204),
            ("DELETE", "/messages/1", 404),
            ("POST", "/messages/2/reject", 204),
            ("GET", "/channels/orders-1?nowait&ack=2", 404),
            ("GET", "/channels/orders-1/messages?after=1", 200),
            ("GET", "/channels/orders-1/messages?state=ready&after=3", 200),
            ("GET", "/channels/orders-1?nowait", 200),
            ("GET", "/channels/orders-1?nowait&ack=3&lease=1", 204),
        ):
            with self.subTest(method + " " + path):
                self.assertEqual(self.call(method, path, None, bearer("sh0p"))[0], status)

    def test_a_message_that_has_moved_away_is_not_accessible(self):
        id = self.broker.post("orders-1", b"x", dead="other").id
        real = linger.Broker.channels_of

        def and_then_it_moves(broker, ids):
            channels = real(broker, ids)
            broker.reject(id)
            return channels

        with unittest.mock.patch.object(linger.Broker, "channels_of", and_then_it_moves):
            self.assertEqual(self.as_shop("DELETE", f"/messages/{id}")[0], 404)
        self.assertEqual(self.broker.read_message(id)[0].channel, "other")

    def test_lists_show_only_what_the_token_may_see(self):
        for channel in ("orders-1", "other"):
            self.broker.subscribe(channel, "orders")
            self.broker.subscribe(channel, "news")
        self.assertEqual(self.as_shop("GET", "/channels"), (200, {"channels": ["orders-1"]}))
        self.assertEqual(self.as_shop("GET", "/topics"), (200, {"topics": ["orders"]}))
        (info,) = self.as_shop("GET", "/channels?info")[1]["channels"]
        self.assertEqual(info["topics"], ["orders"])
        self.assertEqual(self.as_shop("GET", "/channels/orders-1/info")[1]["topics"], ["orders"])
        self.assertEqual(
            self.as_shop("GET", "/channels/orders-1/topics")[1], {"topics": ["orders"]}
        )
        self.assertEqual(
            self.as_shop("GET", "/topics/orders/channels")[1], {"channels": ["orders-1"]}
        )

    def test_a_publication_reports_only_channels_that_the_token_covers(self):
        for channel in ("orders-1", "other", "full", "orders-2"):
            self.broker.subscribe(channel, "orders")
        for channel in ("full", "orders-2"):
            self.broker.set_settings(channel, hlm=1)
            self.broker.post(channel, b"x")
        for key in ("", "&dedup=k", "&dedup=k"):
            status, headers, body = self.call(
                "POST", f"/topics/orders?msg=x{key}", None, bearer("sh0p")
            )
            self.assertEqual(status, 202)
            self.assertEqual(set(json.loads(body)) - {"duplicate"}, {"orders-1"})
            dropped = None if "duplicate" in json.loads(body) else "orders-2"
            self.assertEqual(headers["x-linger-dropped"], dropped)
        self.assertEqual(self.broker.channel_stats("other")["ready"], 2)
        batch = {"Content-Type": "application/x-ndjson"}
        self.assertEqual(
            list(self.as_shop("POST", "/topics/orders/batch", "1", batch)[1]), ["orders-1"]
        )

    def test_no_response_or_log_contains_a_token(self):
        self.server.log_requests = True
        with contextlib.redirect_stderr(io.StringIO()) as log:
            answers = self.call("GET", "/stats", None, bearer("b0ss"))[2]
            answers += self.call("GET", "/topics", None, bearer("wr0ng"))[2]
            answers += self.call("GET", "/topics", None, bearer("wr1te"))[2]
            self.tokens.write_text("b0ss b0ss b0ss\n")
            self.server.reload()
        for token in ("b0ss", "wr0ng", "wr1te"):
            self.assertNotIn(token, log.getvalue() + answers.decode())


class OneTokenTest(ServerTest):
    options = types.MappingProxyType({"token": "T0ken"})

    def test_one_token_gives_full_access_without_reading_the_message(self):
        self.broker.post("q", b"x")
        with unittest.mock.patch.object(linger.Broker, "channels_of", side_effect=AssertionError):
            self.assertEqual(self.call("GET", "/channels/q", None, BEARER)[0], 200)
            self.assertEqual(self.call("DELETE", "/messages/1", None, BEARER)[0], 204)
        self.assertEqual(self.call("GET", "/stats", None, BEARER)[0], 200)
        self.assertEqual(self.call("GET", "/stats")[0], 401)


class SiteTest(ServerTest):
    """Web pages, and names that somebody lets point here."""

    options = types.MappingProxyType(
        {"allow_host": "queue.example,other.example,[2001:db8::1],0.0.0.0"}
    )

    def status_of(self, *lines, method="GET", target="/topics"):
        head = "".join(f"{line}\r\n" for line in (f"{method} {target} HTTP/1.1", *lines))
        return self.statuses(head.encode() + b"\r\n")

    def test_on_loopback_the_host_must_be_loopback_localhost_or_allowed(self):
        for host, status in (
            ("127.0.0.1", 200), ("127.0.0.1:8989", 200), ("[::1]:8989", 200), ("127.9.8.7", 200),
            ("localhost", 200), ("LOCALHOST:1", 200), ("a.localhost", 200), ("localhost.", 200),
            ("queue.example", 200), ("Other.Example:99", 200), ("[2001:DB8::1]:80", 200),
            ("[0:0:0:0:0:0:0:1]", 200), ("127.0.0.1.", 200),
            ("192.0.2.7", 403), ("10.0.0.1", 403), ("[2001:db8::2]", 403), ("[fe80::1]", 403),
            ("evil.example", 403), ("queue.example.evil", 403), ("xlocalhost", 403),
            ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("127.1", 403),
            ("evil.queue.example", 403), ("[::g]", 400),
        ):  # fmt: skip
            with self.subTest(host):
                self.assertEqual(self.status_of(f"Host: {host}"), [status])
                target = f"http://{host}/topics"
                absolute = self.status_of("Host: localhost", target=target)
                self.assertEqual(absolute, [status])

    def test_the_host_of_the_target_counts_and_not_that_of_the_header(self):
        target = "http://localhost/topics"
        self.assertEqual(self.status_of("Host: evil.example", target=target), [200])

    def test_pages_of_other_sites_are_refused_whatever_the_method(self):
        self.broker.post("q", b"x")
        for lines in (
            ("Origin: https://evil.example",),
            ("Origin: null",),
            ("Origin: http://127.0.0.1:1",),
            ("Sec-Fetch-Site: cross-site",),
            ("Sec-Fetch-Site: same-site",),
            ("Sec-Fetch-Site: none, cross-site",),
            ("Origin: http://127.0.0.1", "Sec-Fetch-Site: cross-site"),
        ):
            for method, target in (
                ("GET", "/channels/q"), ("POST", "/channels/q?msg=y"), ("DELETE", "/channels/q"),
                ("PUT", "/channels/q/pause"), ("OPTIONS", "/channels/q"), ("GET", "/health"),
            ):  # fmt: skip
                with self.subTest(method=method, lines=lines):
                    answer = self.status_of("Host: 127.0.0.1", *lines, method=method, target=target)
                    self.assertEqual(answer, [403])
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 0})

    def test_pages_of_the_server_and_programs_pass(self):
        for lines in (
            (),
            ("Origin: http://127.0.0.1:8989",),
            ("Sec-Fetch-Site: same-origin",),
            ("Sec-Fetch-Site: none",),
        ):
            self.assertEqual(self.status_of("Host: 127.0.0.1:8989", *lines), [200], lines)

    def test_checked_headers_are_cached_only_if_they_pass(self):
        bad = b"GET /topics HTTP/1.1\r\nHost: x.example\r\n\r\n"
        good = b"GET /topics HTTP/1.1\r\nHost: localhost\r\n\r\n"
        self.assertEqual(self.statuses(good * 3 + bad), [200, 200, 200, 403])
        absolute = good.replace(b"/topics", b"http://evil.example/topics")
        self.assertEqual(self.statuses(good + absolute), [200, 403])

    def test_no_response_lets_a_foreign_page_read_it(self):
        _, headers, _ = self.call("OPTIONS", "/topics")
        self.assertEqual([n for n in headers if n.startswith("Access-Control")], [])

    def test_elsewhere_the_host_counts_only_if_names_are_listed(self):
        open_to_all = linger.Access(no_auth=True)
        open_to_all.listen("192.0.2.1")
        for host in ("any.example", "any.example:80", "192.0.2.7", "[2001:db8::2]", "a-1"):
            open_to_all.check_origin({"host": host})
        named = linger.Access(no_auth=True, allow_host="queue.example")
        named.listen("192.0.2.1")
        for host in ("queue.example", "192.0.2.1:80", "[2001:db8::1]"):
            named.check_origin({"host": host})
        with self.assertRaises(linger.AccessDenied):
            named.check_origin({"host": "any.example"})

    def test_no_server_is_called_by_an_unspecified_or_mapped_address(self):
        everywhere = linger.Access(no_auth=True, allow_host="0.0.0.0,[::]")
        everywhere.listen("0.0.0.0")
        anywhere = linger.Access(no_auth=True)
        anywhere.listen("192.0.2.1")
        for host in (
            "0.0.0.0", "0.0.0.0:8989", "0.0.0.0.", "[::]", "[0:0:0:0:0:0:0:0]:1", "[::0.0.0.0]",
            "[::ffff:127.0.0.1]", "[::FFFF:7f00:1]:8989", "[0::ffff:0:0]", "[::ffff:192.0.2.1]",
            "0", "0.", "0x0", "0X", "00.0.0.0", "0.0", "127.1", "2130706433", "0x7f.1",
            "0177.0.0.1", "127.0.0.01", "[127.0.0.1]", "a.0", "1.2.3.4.5", "0.0.0.%30", "%30",
        ):  # fmt: skip
            for access in (everywhere, anywhere):
                with self.subTest(host), self.assertRaises(linger.AccessDenied):
                    access.check_origin({"host": host})
            self.assertEqual(self.status_of(f"Host: {host}"), [403], host)


class PageTest(ServerTest):
    """What web pages can make a browser send to a server that has no TLS and is not on loopback:
    there it sends no Sec-Fetch-Site."""

    options = types.MappingProxyType({"host": "0.0.0.0", "no_auth": True, "allow_host": "x"})
    HOST = "192.168.7.9:8989"
    # As Chromium sends them, in its order.
    BROWSER = types.MappingProxyType(
        {
            "Connection": "keep-alive",
            "User-Agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko)"
            " Chrome/156.0.0.0 Safari/537.36",
            "Accept-Encoding": "gzip, deflate",
            "Accept-Language": "en-US,en;q=0.9",
        }
    )
    IMAGE = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"
    PAGE = (
        "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,"
        "*/*;q=0.8,application/signed-exchange;v=b3;q=0.7"
    )

    def setUp(self):
        super().setUp()
        self.broker.post("q", b"x")

    def take(self, headers, path="/channels/q?nowait", method="GET"):
        return self.call(method, path, None, {"Host": self.HOST, **headers})[0]

    def test_subresources_of_foreign_pages_take_nothing(self):
        referers = ({"Referer": "https://evil.example/"}, {"Referer": "http://192.168.7.9/"}, {})
        for accept in (
            self.IMAGE,  # <img>
            "*/*",  # <script>, <video>
            "text/css,*/*;q=0.1",  # <link rel=stylesheet>
            self.PAGE,  # <iframe>, a link, a form with method=get
            "image/webp,image/avif,image/jxl,video/*;q=0.8,image/png,*/*;q=0.5",  # Safari
            "video/webm,video/ogg,video/*;q=0.9,*/*;q=0.5",  # Firefox
        ):
            for referer in referers:  # none: Referrer-Policy: no-referrer
                with self.subTest(accept=accept, referer=referer):
                    browser = {**self.BROWSER, "Accept": accept, **referer}
                    self.assertEqual(self.take(browser), 403)
                    self.assertEqual(self.take(browser, "/backup"), 403)
                    self.assertEqual(self.take(browser, "/messages/1", "DELETE"), 403)
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 0})

    def test_one_mark_of_a_browser_is_enough(self):
        for headers in (
            {"Accept": self.IMAGE},
            {"Accept": "application/javascript, */*;q=0.8"},
            {"Referer": "https://evil.example/"},
            {"Referer": f"http://evil.example/{self.HOST}/"},
            {"Referer": "about:blank"},
            {"Sec-Fetch-Dest": "script"},
            {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Dest": "image"},
            {"Sec-Fetch-Site": "none", "Sec-Fetch-Dest": "iframe"},
        ):
            self.assertEqual(self.take(headers), 403, headers)
        _, _, body = self.call("DELETE", "/channels/q", None, {"Host": "x", "Accept": self.IMAGE})
        self.assertIn("a browser sent this for another page", json.loads(body)["error"])
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 0})

    def test_pages_of_the_server_itself_may_take(self):
        for headers in (
            {**self.BROWSER, "Accept": "*/*", "Referer": f"http://{self.HOST}/"},
            {**self.BROWSER, "Accept": "*/*", "Referer": f"HTTPS://{self.HOST}/a?b"},
            {**self.BROWSER, "Accept": "*/*", "Origin": f"http://{self.HOST}"},
            {**self.BROWSER, "Accept": "application/json", "Sec-Fetch-Site": "same-origin",
             "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"},
            {**self.BROWSER, "Accept": self.PAGE, "Sec-Fetch-Site": "none",
             "Sec-Fetch-Mode": "navigate", "Sec-Fetch-User": "?1", "Sec-Fetch-Dest": "document"},
        ):  # fmt: skip
            self.broker.post("q", b"x")
            self.assertEqual(self.take(headers), 200, headers)

    def test_programs_are_not_mistaken_for_browsers(self):
        for headers in (
            {},  # Tornado and lingerclient, http.client, LWP
            {"User-Agent": "curl/8.5.0", "Accept": "*/*"},
            {"User-Agent": "python-requests/2.31.0", "Accept-Encoding": "gzip, deflate",
             "Accept": "*/*", "Connection": "keep-alive"},
            {"User-Agent": "Wget/1.21.3", "Accept": "*/*", "Accept-Encoding": "identity"},
            {"User-Agent": "node", "Accept": "*/*", "Accept-Language": "*",
             "Sec-Fetch-Mode": "cors", "Accept-Encoding": "gzip, deflate"},
            {"User-Agent": "Java/17.0.1", "Accept": "text/html, image/gif, image/jpeg, */*; q=.2"},
            {"User-Agent": "Mozilla/5.0 (Windows NT; Windows NT 10.0; en-US)"
             " WindowsPowerShell/5.1.19041.1"},
            {"User-Agent": "Mozilla/5.0 (Linux; en-US) PowerShell/7.4.1", "Accept-Language": "en"},
            {"User-Agent": "Mozilla/5.0 (compatible; Hook/1.0)", "Accept": "*/*"},
        ):  # fmt: skip
            self.broker.post("q", b"x")
            self.assertEqual(self.take(headers), 200, headers)

    def test_a_browser_may_read(self):
        for headers in ({**self.BROWSER, "Accept": self.PAGE}, {"Accept": self.IMAGE}):
            self.assertEqual(self.take(headers, "/channels/q/messages"), 200)

    def test_its_url_is_one_by_which_it_can_be_called(self):
        self.assertEqual(self.server.url, f"http://127.0.0.1:{self.address[1]}")
        with linger.Client(self.server.url) as client:
            self.assertEqual(client.get("q").body, b"x")


class CorsTest(ServerTest):
    options = types.MappingProxyType(
        {"cors": "https://a.example, http://b.example:8080", "token": "T0ken"}
    )

    def test_a_page_that_is_allowed_may_ask_first_and_then_call(self):
        origin = {"Origin": "https://a.example", "Sec-Fetch-Site": "cross-site"}
        asks = {**origin, "Access-Control-Request-Method": "DELETE"}
        status, headers, _ = self.call("OPTIONS", "/messages/1", None, asks)
        self.assertEqual(status, 204)
        self.assertEqual(headers["Access-Control-Allow-Origin"], "https://a.example")
        self.assertIn("DELETE", headers["Access-Control-Allow-Methods"])
        self.assertIn("Authorization", headers["Access-Control-Allow-Headers"])
        self.assertEqual(headers["Access-Control-Max-Age"], "600")
        status, headers, _ = self.call("POST", "/channels/q", "x", {**origin, **BEARER})
        self.assertEqual((status, headers["Vary"]), (202, "Origin"))
        self.assertEqual(headers["Access-Control-Allow-Origin"], "https://a.example")
        self.assertEqual(headers["Access-Control-Expose-Headers"], "*")
        self.assertIsNone(headers["Access-Control-Allow-Methods"])

    def test_it_can_read_its_errors_and_needs_a_token(self):
        for path, headers, expected in (("/topics", {}, 401), ("/nowhere", BEARER, 404)):
            origin = {"Origin": "http://b.example:8080", **headers}
            status, answer, _ = self.call("GET", path, None, origin)
            self.assertEqual(status, expected)
            self.assertEqual(answer["Access-Control-Allow-Origin"], "http://b.example:8080")

    def test_others_are_refused_also_when_they_ask_first(self):
        for origin in ("https://b.example", "http://a.example", "https://a.example.evil", "null"):
            asks = {"Origin": origin, "Access-Control-Request-Method": "GET"}
            status, headers, _ = self.call("OPTIONS", "/topics", None, asks)
            self.assertEqual((status, headers["Access-Control-Allow-Origin"]), (403, None))
        self.assertEqual(self.call("GET", "/topics", None, BEARER)[1]["Vary"], "Origin")
        self.assertEqual(self.call("OPTIONS", "/topics")[0], 401)

    def test_a_star_allows_all(self):
        access = linger.Access(cors="*")
        lines = access.check_origin({"host": "localhost", "origin": "null"})
        self.assertIn("Access-Control-Allow-Origin: *\r\n", lines)
        self.assertNotIn("Vary", lines)


# For localhost and 127.0.0.1, from 2020 to 2120; it guards nothing.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgBxj4KN22wmIf0zwI
/+qu+A8XIicqL5+OwMZyfLxDgGuhRANCAAQBysVnfULd9jflM9USXm2IaThk2kH9
gTPn3kQijdvHo6gA120Rhv4Jba3ill7Gb49+DOeOdm9kazIgFRLR8mPg
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBdzCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABAHKxWd9Qt32N+Uz
1RJebYhpOGTaQf2BM+feRCKN28ejqADXbRGG/gltreKWXsZvj34M5452b2RrMiAV
EtHyY+CjXjBcMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAPBgNVHRMBAf8E
BTADAQH/MB0GA1UdDgQWBBRsyHZgnP1cNJTDLwyr2sbvEZ7w7TAOBgNVHQ8BAf8E
BAMCAoQwCgYIKoZIzj0EAwIDSAAwRQIhAKIr2DeHSmMN9pTOyxjL90GPtQjIedLj
34IQJLUxOah+AiA3KiF3YZi/yY6MW3BakLJPfzfYGV0WwNX5LNB1cc/HvQ==
-----END CERTIFICATE-----
"""


class TlsTest(ServerTest):
    def setUp(self):
        self.hasten(DISCONNECT_CHECK_INTERVAL=0.02)
        self.cert = self.new_folder() / "cert.pem"
        self.cert.write_text(CERTIFICATE)
        self.options = {"cert": str(self.cert), "token": "T0ken"}
        super().setUp()
        self.context = ssl.create_default_context(cafile=str(self.cert))

    def open(self, context=None):
        context = context or self.context
        return context.wrap_socket(self.connect(), server_hostname="localhost")

    def call(self, method, path, body=None, headers=BEARER):
        client = http.client.HTTPSConnection(
            "localhost", self.address[1], timeout=PATIENCE, context=self.context
        )
        with contextlib.closing(client):
            return exchange(client, method, path, body, headers)

    def test_a_large_message_goes_in_and_out(self):
        self.assertEqual(self.server.url, f"https://127.0.0.1:{self.address[1]}")
        body = random.Random(1).getrandbits(8 * 250_000).to_bytes(250_000, "big")
        self.assertEqual(self.call("POST", "/channels/q", body)[0], 202)
        self.assertEqual(self.call("GET", "/channels/q")[2], body)
        self.assertEqual(self.call("GET", "/topics", None, {})[0], 401)

    def test_a_closed_connection_leaves_nothing_to_the_garbage_collector(self):
        kinds = linger.Connection, linger.Request, linger.TlsStream

        def count():
            return sum(type(thing) in kinds for thing in gc.get_objects())

        gc.disable()
        self.addCleanup(gc.enable)
        before = count()
        for _ in range(10):
            self.assertEqual(self.call("GET", "/channels/q?nowait")[0], 204)
        until(lambda: count() < before + 10)  # an idle thread may still know the last ones

    def test_a_failed_handshake_leaves_nothing_to_the_garbage_collector(self):
        gc.disable()
        self.addCleanup(gc.enable)
        for _ in range(10):
            self.talk(b"no TLS")
        until(lambda: not self.server.connections)
        until(lambda: not any(type(thing) is linger.TlsStream for thing in gc.get_objects()))

    def test_an_error_can_be_read_while_the_body_is_still_being_sent(self):
        with self.open() as connection:
            connection.sendall(
                b"POST /channels/q HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer T0ken\r\n"
                b"Content-Length: 2000000\r\n\r\n" + b"x" * 2_000_000
            )
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 413 "))

    def test_wait_of_a_client_can_be_stopped(self):
        stop = threading.Event()
        with linger.Client(self.server.url, "T0ken", cafile=str(self.cert)) as client:
            self.assertIsNone(client.get("q", wait=0, stop=stop))
            taking = self.thread(lambda: client.get("q", stop=stop))
            until(lambda: count_waiting(self.broker))
            stop.set()
            self.assertIsNone(taking.result(PATIENCE))

    def test_a_connection_is_kept_and_closed_with_close_notify(self):
        with self.open() as connection:
            for _ in range(3):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 200 "))
            connection.sendall(
                b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 200 "))
            connection.suppress_ragged_eofs = False
            self.assertEqual(connection.recv(1000), b"")

    def test_the_end_of_a_wait_and_an_error_are_followed_by_close_notify(self):
        get = b"GET /channels/q HTTP/1.0\r\nAuthorization: Bearer T0ken\r\n\r\n"
        for request, status in ((get, b"200"), (b"x\r\n\r\n", b"400"), (get, b"204")):
            with self.open() as connection:
                connection.suppress_ragged_eofs = False
                connection.sendall(request)
                if status != b"400":
                    until(lambda: count_waiting(self.broker, "q"))
                    if status == b"200":
                        self.broker.post("q", b"x")
                    else:
                        self.server.close()
                self.assertEqual(connection.recv(1000).split()[1], status)
                self.assertEqual(connection.recv(1000), b"")

    def test_the_client_trusts_only_the_given_certificates(self):
        body = random.Random(1).getrandbits(8 * 250_000).to_bytes(250_000, "big")
        with linger.Client(self.server.url, "T0ken", cafile=str(self.cert)) as client:
            for _ in range(2):
                client.post("q", body)
                self.assertEqual(client.get("q").body, body)
            self.assertEqual(len(self.server.connections), 1)
        with linger.Client(self.server.url, "wr0ng", cafile=str(self.cert)) as client:
            with self.assertRaises(linger.AccessDenied) as caught:
                client.stats()
            self.assertEqual(caught.exception.status, 401)
            with self.assertRaises(linger.AccessDenied):
                client.work("q", print)
        untrusted = self.assertRaisesRegex(linger.Unavailable, "cannot connect .*CERTIFICATE")
        with linger.Client(self.server.url, "T0ken") as client, untrusted:
            client.stats()

    def test_a_worker_that_waits_over_tls_stops_when_asked(self):
        self.hasten(HEARTBEAT_INTERVAL=0.02)
        stop = threading.Event()
        with linger.Client(self.server.url, "T0ken", cafile=str(self.cert)) as client:
            work = self.thread(lambda: client.work("q", print, stop=stop))
            until(lambda: count_waiting(self.broker, "q"))
            stop.set()
            work.result(PATIENCE)

    def test_only_tls_1_2_and_newer_are_spoken(self):
        self.assertEqual(self.server.access.tls.minimum_version, ssl.TLSVersion.TLSv1_2)
        self.context.maximum_version = ssl.TLSVersion.TLSv1_2
        with self.open() as connection:
            self.assertEqual(connection.version(), "TLSv1.2")

    def test_a_consumer_waits_and_one_that_hung_up_gets_nothing(self):
        get = b"GET /channels/q HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer T0ken\r\n\r\n"
        gone, waiting = self.open(), self.open()
        for count, connection in enumerate((gone, waiting), 1):
            connection.sendall(get)
            until(lambda n=count: count_waiting(self.broker, "q") == n)
        gone.close()
        self.broker.post("q", b"x")
        with waiting:
            answer = waiting.recv(1000)
        self.assertIn(b"x-linger-delivered: 1\r\n", answer)

    def test_stalled_handshakes_delay_no_others_and_time_out(self):
        def stall():
            connections = [self.connect() for _ in range(100)]
            for connection in connections[::2]:
                connection.sendall(b"\x16\x03\x01\x02\x00\x01")  # the begin of a ClientHello
            return connections

        stall()
        until(lambda: len(self.server.active) == 100)
        start = time.monotonic()
        self.assertEqual(self.call("GET", "/topics")[0], 200)
        self.assertLess(time.monotonic() - start, 1)
        self.server.read_timeout = 0.05
        for connection in stall():
            while connection.recv(1000):
                pass
        until(lambda: len(self.server.connections) == 100)

    def test_a_record_that_trickles_in_ends_in_time_too(self):
        with self.open() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            connection.recv(1000)
            self.server.read_timeout = 0.1
            raw = socket.socket(fileno=os.dup(connection.fileno()))
            with raw:
                start = time.monotonic()
                for byte in b"\x17\x03\x03\x40\x00" + b"x" * 1000:
                    try:
                        raw.send(bytes([byte]))
                    except OSError:
                        break
                    if select.select([raw], [], [], 0.02)[0]:
                        break
                self.assertLess(time.monotonic() - start, 4)

    def test_what_is_no_tls_is_closed_without_a_traceback(self):
        with contextlib.redirect_stderr(io.StringIO()) as log:
            for data in (CALL, b"\x16\x03\x01" + b"\xff" * 500, os.urandom(500), b""):
                self.assertNotIn(b"HTTP", self.talk(data))
            until(lambda: not self.server.connections)
        self.assertEqual(log.getvalue(), "")

    def test_a_new_certificate_is_for_new_connections_and_a_broken_one_for_none(self):
        old = self.server.access.tls
        with contextlib.redirect_stderr(io.StringIO()) as log:
            self.cert.write_text(CERTIFICATE[:400])
            self.server.reload()
        self.assertRegex(log.getvalue(), "^linger: cannot use the certificate .*still holds\n$")
        self.assertIs(self.server.access.tls, old)
        self.cert.write_text(CERTIFICATE)
        with contextlib.redirect_stderr(io.StringIO()):
            self.server.reload()
        self.assertIsNot(self.server.access.tls, old)
        self.assertEqual(self.call("GET", "/topics")[0], 200)

    def test_a_stop_ends_handshakes_at_once(self):
        connection = self.connect()
        until(lambda: any(handler.idle for handler in self.server.active))
        start = time.monotonic()
        self.server.close()
        self.assertLess(time.monotonic() - start, 1)
        connection.close()


# -- the process ---------------------------------------------------------------------------------


# -- the client ----------------------------------------------------------------------------------


class ClientCase(ServerTest):
    def setUp(self):
        self.hasten(DISCONNECT_CHECK_INTERVAL=0.02)
        super().setUp()
        self.client = linger.Client(self.server.url, timeout=PATIENCE)
        self.addCleanup(self.client.close)


class ClientTest(ClientCase):
    """The methods of the client; the sessions in README.md test each of them as well."""

    def test_body_may_be_bytes_text_or_any_json(self):
        for body, sent, kind in (
            (b"\0\xff", b"\0\xff", "text/plain"),
            (bytearray(b"x"), b"x", "text/plain"),
            ("grüße", "grüße".encode(), "text/plain; charset=utf-8"),
            ({"ä": [1, None]}, '{"ä":[1,null]}'.encode(), "application/json"),
            (7, b"7", "application/json"),
        ):
            with self.subTest(body):
                self.client.post("q", body)
                message = self.client.get("q", auto=True)
                self.assertEqual((message.body, message.type), (sent, kind))
        self.client.post("q", "x", "image/x; a=b")
        self.assertEqual(self.client.get("q").type, "image/x; a=b")

    def test_a_wrong_name_or_body_is_refused_in_words(self):
        endless = []
        endless.append(endless)
        for call, words in (
            (lambda: self.client.post(5, "x"), "5 must be text"),
            (lambda: self.client.get(["q", None]), "None must be text"),
            (lambda: self.client.get(b"q"), "b'q' must be text"),
            (lambda: self.client.post("q", float("nan")), "must be bytes, text or JSON"),
            (lambda: self.client.post_batch("q", [endless]), "must be bytes, text or JSON"),
            (lambda: self.client.post("q", {1, 2}), "must be bytes, text or JSON"),
            (lambda: self.client.post("q", "x", type=b"text/plain"), "header value"),
        ):
            with self.subTest(words), self.assertRaisesRegex(linger.BadRequest, words):
                call()
        self.assertEqual(self.client.channel_stats("q"), {"ready": 0, "hidden": 0})

    def test_message_arrives_as_the_broker_delivers_it(self):
        self.client.post(
            "q", b"\xff", priority=-3, timeout=9, deliver=4, linger=99, backoff="0", dead="d",
        )  # fmt: skip
        self.client.release(self.client.get("q"), reason="why\nnot%2F")
        message = self.client.get("q", timeout=5)
        self.assertEqual(message[:12], (1, "q", -3, 5, 4, 2, 0, 99, "", 2, "text/plain", b"\xff"))
        self.assertEqual(message.error, "why\nnot%2F")
        self.assertEqual(self.client.read_message(1), self.broker.read_message(1))
        self.assertEqual(self.client.read_message(1)[0].dead, "d")

    def test_release_may_undo_the_delivery(self):
        self.client.post("q", "x", deliver=1)
        self.client.release(self.client.get("q"), reason="no memory", uncounted=True)
        message = self.client.get("q", 0)
        self.assertEqual((message.delivered, message.error), (1, "no memory"))
        with self.assertRaisesRegex(linger.BadRequest, "needs the lease"):
            self.client.release(message.id, uncounted=True)

    def test_text_and_json_raise_value_error_for_other_bodies(self):
        self.client.post("q", b"\xff")
        message = self.client.get("q")
        self.assertRaises(ValueError, lambda: message.text)
        self.assertRaises(ValueError, message.json)

    def test_names_with_special_characters_reach_the_server(self):
        for name in ("a/b", "a,b", "你好?", "50%", "%41", " ", "..", "#"):
            with self.subTest(name):
                self.client.subscribe(name, name, dead=name + "x")
                self.assertEqual(list(self.client.publish(name, "x", unique=None)), [name])
                message = self.client.get([name, "other"], wait=0)
                self.assertEqual((message.channel, message.topic), (name, name))
                message, state = self.client.read_message(message.id)
                self.assertEqual((message.channel, message.dead), (name, name + "x"))
                self.assertEqual((self.client.topics(name), state), ([name], "hidden"))
                self.client.unsubscribe(name, name)

    def test_batch_keeps_order_types_and_parameters(self):
        items = ["ü", b"\xff", ["json"], ("x", "x/y", {"priority": -1, "dedup_for": 5})]
        ids = self.client.post_batch("q", items, timeout=7)
        taken = self.client.get_batch("q", 10)
        self.assertEqual([m.id for m in taken], [ids[3], *ids[:3]])
        self.assertEqual([m.body for m in taken], [b"x", "ü".encode(), b"\xff", b'["json"]'])
        self.assertEqual(
            [m.type for m in taken[:1]] + [m.timeout for m in taken], ["x/y"] + [7] * 4
        )

    def test_errors_are_those_of_the_broker(self):
        id = self.client.post("q", "x").id
        message = self.client.get("q")
        self.client.release(message)
        self.client.set_settings("q", hlm=1)
        for error, sentence, call in (
            (linger.NotFound, "no message 99", lambda: self.client.delete(99)),
            (linger.Conflict, "not in flight", lambda: self.client.touch(id)),
            (linger.Conflict, "overtaken", lambda: self.client.delete(id, lease=7)),
            (linger.Full, "mark of 1", lambda: self.client.post("q", "x")),
            (linger.TooLarge, "256000", lambda: self.client.post("r", "x" * 256_001)),
            (linger.BadRequest, "is empty", lambda: self.client.post("r", "")),
            (linger.BadRequest, "255 bytes", lambda: self.client.drain("")),
            (linger.BadRequest, "surrogates", lambda: self.client.drain("\ud800")),
            (linger.BadRequest, "surrogates", lambda: self.client.post("r", "\ud800")),
            (
                linger.BadRequest,
                "unknown parameter prio: ",
                lambda: self.client.post("r", "x", prio=1),
            ),
            (linger.BadRequest, "timeout must", lambda: self.client.post("r", "x", timeout=0)),
            (linger.BadRequest, "valid header", lambda: self.client.post("r", "x", "a\r\nb: c")),
        ):
            with self.subTest(sentence), self.assertRaisesRegex(error, sentence):
                call()
        for items in (["a", ("b", None, {"timeout": 0})], ["a", ""]):
            with self.assertRaises(linger.BadRequest) as caught:
                self.client.post_batch("r", items)
            self.assertEqual(caught.exception.index, 1)
        self.assertEqual(self.client.channels(), ["q"])

    def test_failed_acknowledgement_takes_nothing(self):
        self.client.post_batch("q", ["1", "2"])
        message = self.client.get("q")
        self.client.delete(message)
        with self.assertRaises(linger.NotFound):
            self.client.get("q", ack=message)
        self.assertEqual(self.client.channel_stats("q"), {"ready": 1, "hidden": 0})

    def test_wait_may_be_longer_than_the_timeout(self):
        self.client.timeout = 0
        waiting = self.thread(self.client.get, "q", 5)
        until(lambda: self.broker.info("q")["waiting"])
        self.broker.post("q", b"x")
        self.assertEqual(waiting.result(PATIENCE).text, "x")

    def test_duplicate_is_reported_only_for_a_key_of_the_caller(self):
        self.assertFalse(self.client.post("q", "x", retry=True).duplicate)
        self.client.post("q", "x", unique="k")
        self.assertEqual(self.client.post("q", "x", unique="k"), (2, True))
        self.client.subscribe("duplicate", "t")
        self.client.publish("t", "x", dedup="k")
        self.assertEqual(self.client.publish("t", "x", dedup="k"), {})
        self.assertEqual(self.client.publish("t", "x"), {"duplicate": 4})

    def test_dump_and_load_keep_order_and_parameters(self):
        self.client.post_batch(
            "a/b", ["ü", (b"\xff", "x/y", {"priority": -1, "delay": 60, "linger": 70}), {"n": 1}],
            deliver=3, dead="d", backoff="1,2", timeout=8,
        )  # fmt: skip
        self.client.post("c", "x" * 5_000, unique="k")
        self.client.get("a/b")
        records = list(self.client.dump())
        self.assertEqual(json.loads(json.dumps(records)), records)
        before = [self.client.read_message(id)[0] for id in (1, 2, 3, 4)]
        before[0] = before[0]._replace(hidden_for=0, holder="")
        for channel in self.client.channels():
            self.client.drain(channel)
        self.assertEqual(self.client.load(records), 4)
        after = [self.client.read_message(id)[0] for id in (5, 6, 7, 8)]
        for old, new in zip(before, after):
            new = new._replace(id=old.id, lease=old.lease, delivered=old.delivered)
            self.assertEqual(new, old)
        self.assertEqual(self.client.read_message(5)[1], "ready")

    def test_dump_and_load_work_in_pages(self):
        with unittest.mock.patch.multiple(linger, MAX_BATCH=3, MAX_BATCH_BYTES=400):
            self.client.post("q", "x" * 300)
            for _ in range(3):
                self.client.post_batch("q", ["y" * 100] * 2)
            self.assertEqual(len(self.broker.list_whole("q", None, 10, None)), 2)
            self.assertEqual([len(r["body"]) for r in self.client.dump(["q"])], [300] + [100] * 6)
            n = self.client.load({**r, "channel": "r"} for r in self.client.dump(["q"]))
        self.assertEqual((n, self.client.channel_stats("r")["ready"]), (7, 7))

    def test_error_of_a_bad_record_has_its_index(self):
        self.hasten(MAX_BATCH=2)
        good = {"channel": "q", "body": "x"}
        for bad in ({"body": "x"}, "x", {"channel": "q"}, {**good, "timeout": 0}):
            with self.subTest(bad), self.assertRaises(linger.BadRequest) as caught:
                self.client.load([good, good, good, bad])
            self.assertEqual(caught.exception.index, 3)

    def test_dump_keeps_the_remaining_linger_and_delay(self):
        record = linger.dumped_record(
            {"channel": "q", "type": "x", "body": "x", "linger": 60, "received": 100, "delay": 9}
        )
        self.assertEqual(record, {"channel": "q", "type": "x", "body": "x", "linger": 1})

    def test_url_and_token_default_to_the_environment(self):
        script = Script(response(200, b"{}"))
        self.addCleanup(script.close)
        environment = {"LINGER_URL": script.url + "/", "LINGER_TOKEN": "s3cret"}
        with unittest.mock.patch.dict(os.environ, environment), linger.Client() as client:
            self.assertEqual(client.server_info(), {})
        self.assertIn(b"\r\nAuthorization: Bearer s3cret\r\n", script.requests[0])

    def test_invalid_url_or_token_is_refused(self):
        for url in (
            "127.0.0.1", "ftp://x", "http://", "http://u:p@x", "http://x?q",
            "http://x:port", "http://x\r\ny", "http://ä", "http://a..b",
        ):  # fmt: skip
            with self.subTest(url), self.assertRaisesRegex(linger.BadRequest, "URL must be"):
                linger.Client(url)
        self.assertRaises(linger.BadRequest, linger.Client, token="a b")
        self.assertRaises(linger.BadRequest, linger.Client, token=b"secret")
        for timeout in (0, -1, math.nan, math.inf, 1e9, "30", None):
            with self.subTest(timeout), self.assertRaisesRegex(linger.BadRequest, "seconds"):
                linger.Client(timeout=timeout)
        self.assertRaises(linger.BadRequest, linger.Client, "https://x", cafile="/no/such")

    def test_each_thread_has_a_connection_until_it_ends(self):
        ready = threading.Barrier(8)

        def work(n):
            ready.wait(PATIENCE)
            for _ in range(20):
                self.client.post("q", str(n))
                self.client.delete(self.client.get("q"))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
            self.assertEqual(len(self.server.connections), 8)
        until(lambda: not self.server.connections)
        self.assertEqual(self.client.stats()["current-messages"], 0)

    def test_close_ends_waiting_and_later_calls(self):
        waiting = self.thread(self.client.get, "q")
        until(lambda: self.broker.info("q")["waiting"])
        self.client.close()
        for call in (lambda: waiting.result(PATIENCE), self.client.stats):
            self.assertRaises(linger.Unavailable, call)
        until(lambda: not self.server.connections)

    def test_health_is_false_when_the_server_is_down(self):
        self.assertIs(self.client.health(), True)
        self.server.close()
        self.assertIs(self.client.health(), False)
        with self.assertRaisesRegex(linger.Unavailable, f"cannot connect to {self.server.url}: "):
            self.client.stats()


class UnixSocketTest(Folder):
    """A server that listens on a Unix socket, and its clients."""

    def setUp(self):
        super().setUp()
        self.path = self.folder / "a b" / "linger.sock"
        self.path.parent.mkdir()

    def serve(self, **options):
        server = linger.serve(f"unix:{self.path}", **options)
        self.addCleanup(server.close)
        return server

    def client(self, server, **options):
        client = linger.Client(server.url, timeout=PATIENCE, **options)
        self.addCleanup(client.close)
        return client

    def test_all_calls_work_over_it(self):
        self.hasten(LISTENER_CHECK_INTERVAL=0.02)
        server = self.serve()
        self.assertEqual(server.url, f"http+unix://{urllib.parse.quote(str(self.path), safe='')}")
        client = self.client(server)
        waiting = self.thread(client.get, "q")
        until(lambda: count_waiting(server.broker))
        client.post("q", b"x" * 200_000)
        message = waiting.result(PATIENCE)
        self.assertEqual((len(message.body), client.list_messages("q")[0][0].holder),
                         (200_000, f"unix:{os.getuid()}"))  # fmt: skip
        event = self.thread(next, client.live("q"))
        until(lambda: server.broker._state.live.channels)
        client.delete(message)
        self.assertEqual(event.result(PATIENCE).name, "deleted")

    def test_a_client_that_hangs_up_is_noticed(self):
        server = self.serve()
        connection = socket.socket(socket.AF_UNIX)
        self.addCleanup(connection.close)
        connection.connect(str(self.path))
        connection.sendall(b"GET /channels/q HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: count_waiting(server.broker))
        connection.close()
        until(lambda: not count_waiting(server.broker))

    def test_owner_and_group_may_connect_until_it_stops(self):
        server = self.serve()
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o660)
        server.close()
        self.assertFalse(self.path.exists())

    def test_what_a_dead_server_has_left_is_replaced_and_a_living_one_is_refused(self):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(self.path))
        server = self.serve()
        with self.assertRaisesRegex(OSError, "a server listens there"):
            self.serve()
        self.assertTrue(self.client(server).health())

    def test_what_is_no_socket_stays(self):
        self.path.write_text("mine")
        with self.assertRaisesRegex(OSError, "no socket"):
            self.serve()
        self.assertEqual(self.path.read_text(), "mine")

    def test_a_server_that_stops_leaves_the_socket_of_its_successor(self):
        server = self.serve()
        self.path.unlink()
        successor = self.serve()
        server.close()
        self.assertTrue(self.client(successor).health())

    def test_pages_hosts_and_tokens_have_the_rules_of_loopback(self):
        server = self.serve(token="s3cret")
        with self.assertRaises(linger.AccessDenied):
            self.client(server).stats()
        for _ in range(linger.FREE_AUTH_FAILURES):
            server.access.throttle.record_failure(f"unix:{os.getuid()}")
        self.assertGreater(server.access.throttle.record_failure(f"unix:{os.getuid()}"), 0)
        client = self.client(server, token="s3cret")
        client.stats()
        client._transport._base_headers += "Origin: http://b.example\r\n"
        with self.assertRaises(linger.AccessDenied):
            client.stats()
        with self.assertRaisesRegex(linger.BadRequest, "TLS"):
            access = linger.Access()
            access.tls = True
            linger.Server(server.broker, f"unix:{self.path}2", access=access)

    def test_the_connections_of_a_user_are_limited(self):
        server = self.serve(max_connections_per_address=1)
        self.client(server).stats()
        with self.assertRaisesRegex(linger.Unavailable, "too many connections"):
            self.client(server).stats()


class ClientLiveTest(ClientCase):
    """`Client.live`, and the commands that use it."""

    def setUp(self):
        self.hasten(MIN_RETRY_DELAY=0.01, LISTENER_CHECK_INTERVAL=0.02, STOP_CHECK_INTERVAL=0.02)
        super().setUp()
        self.live = self.broker._state.live

    def when_listening(self, action):
        """Does something in another thread once somebody listens."""

        def run():
            until(lambda: self.live.channels or self.live.topics)
            return action()

        return self.thread(run)

    def test_it_yields_what_happens_to_the_messages_of_a_channel(self):
        given = {"priority": 3, "dead": "dead", "headers": {"a": "b"}}
        self.when_listening(
            lambda: self.broker.reject(self.broker.post("q/ä", b"\xff", "text/x", **given).id)
        )
        posted, rejected, moved = itertools.islice(self.client.live("q/ä"), 3)
        self.assertEqual((posted.name, rejected.name, moved.name), ("posted", "rejected", "moved"))
        self.assertEqual(
            posted.message[:3] + posted.message[10:12], (1, "q/ä", 3, "text/x", b"\xff")
        )
        self.assertEqual((posted.message.headers, posted.gap), ({"a": "b"}, False))
        self.assertEqual((moved.source, moved.message.channel), ("q/ä", "dead"))

    def test_it_yields_what_is_published_on_a_topic(self):
        self.when_listening(lambda: self.client.publish("news", "x", headers={"a": "b"}))
        event = next(self.client.live(topic="news"))
        message = event.message
        self.assertEqual((event.name, message.topic, message.text, message.headers),
                         ("published", "news", "x", {"a": "b"}))  # fmt: skip

    def test_it_connects_again_and_says_that_events_may_be_missing(self):
        events = self.client.live("q")
        posted = self.when_listening(lambda: self.broker.post("q", b"1"))
        self.assertFalse(next(events).gap)
        posted.result(PATIENCE)
        (reader,) = self.live.channels["q"].readers
        reader.listener.disconnect()
        until(lambda: not self.live.channels)
        self.when_listening(lambda: self.broker.post_batch("q", [(b"2", "x", {})] * 2))
        with self.assertLogs("linger", "WARNING") as logs:
            self.assertEqual([event.gap for event in itertools.islice(events, 2)], [True, False])
        self.assertIn("the server responds again: events may be missing", logs.output[-1])

    def test_another_thread_can_stop_it(self):
        stop = threading.Event()
        self.when_listening(stop.set)
        self.assertEqual(list(self.client.live("q", stop=stop)), [])

    def test_closing_the_client_ends_it(self):
        self.when_listening(self.client.close)
        with self.assertRaises(linger.Unavailable):
            next(self.client.live("q"))

    def test_an_error_that_no_retry_repairs_is_raised(self):
        for names in ((), ("q", "news"), ("",)):
            with self.assertRaises(linger.LingerError):
                next(self.client.live(*names))

    def test_it_leaves_the_connection_of_other_calls_alone(self):
        self.client.stats()
        self.when_listening(lambda: self.broker.post("q", b"x"))
        events = self.client.live("q")
        next(events)
        self.assertEqual(self.client.get("q", 0).text, "x")
        self.assertEqual(next(events).name, "delivered")
        events.close()
        until(lambda: not self.live.channels)

    def test_a_client_may_have_a_name_that_listings_show(self):
        for name, holder in (("wörk%1", "wörk%1"), ("", "127.0.0.1")):
            self.client.post("q", "x")
            taken = linger.Client(self.server.url, name=name)
            self.addCleanup(taken.close)
            id = taken.get("q", 0).id
            message, _ = self.client.read_message(id)
            self.assertEqual((message.holder, message.hidden_for), (holder, 30))
            (listed,) = self.client.list_messages("q")
            self.assertEqual((listed[0].holder, listed[0].hidden_for), (holder, 30))
            self.client.delete(id)
        self.assertEqual(self.call("GET", "/channels/q?nowait&as=a%0ab")[0], 400)

    def test_tail_writes_a_line_for_each_event(self):
        self.when_listening(lambda: self.broker.get(self.client.post("q", "a\tb") and "q"))
        output = run_command(self.server.url, "tail", "q", "--count=2")
        self.assertEqual(output, (0, b"posted\t1\t0\t-\ta\\tb\ndelivered\t1\t1\t-\ta\\tb\n", ""))

    def test_listen_writes_a_line_for_each_publication(self):
        for option, line in (
            ((), b"a\\nb\n"),
            (("--json",), b'{"topic":"t","type":"x","body":"a\\nb"}\n'),
        ):
            self.when_listening(lambda: self.broker.publish("t", b"a\nb", "x"))
            output = run_command(self.server.url, "listen", "t", "--count=1", *option)
            self.assertEqual(output, (0, line, ""))
            until(lambda: not self.live.topics)


class StoppedGetTest(ClientCase):
    """`get` with an event that ends its wait."""

    def setUp(self):
        self.hasten(STOP_CHECK_INTERVAL=0.02)
        super().setUp()
        self.stop = threading.Event()

    def get(self, **options):
        return self.thread(lambda: self.client.get("q", stop=self.stop, **options))

    def test_stop_ends_the_wait_and_no_message_is_lost(self):
        taking = self.get()
        until(lambda: count_waiting(self.broker))
        self.stop.set()
        self.assertIsNone(taking.result(PATIENCE))
        self.client.post("q", "x")
        self.assertEqual(self.client.get("q", 5).delivered, 1)

    def test_message_that_comes_in_time_is_returned(self):
        taking = self.get()
        until(lambda: count_waiting(self.broker))
        self.client.post("q", "x")
        self.assertEqual(taking.result(PATIENCE).text, "x")
        self.assertEqual(self.client.get_batch("q", 2, 0, stop=self.stop), [])

    def test_message_that_comes_with_the_stop_is_given_back_uncounted(self):
        for options in ({}, {"auto": True}):
            with self.subTest(options):
                self.stop.clear()
                self.broker.drain("q")
                id = self.broker.post("q", b"x", deliver=1).id
                receive = linger._StoppableReader.readinto

                def set_and_receive(reader, buffer, receive=receive):
                    self.stop.set()
                    return receive(reader, buffer)

                late = unittest.mock.patch.object(
                    linger._StoppableReader, "readinto", set_and_receive
                )
                with late:
                    taken = self.client.get_batch("q", 5, stop=self.stop, **options)
                self.assertEqual([m.id for m in taken], [id] if options else [])
                delivered = [m.delivered for m, _ in self.client.list_messages("q", "ready")]
                self.assertEqual(delivered, [] if options else [0])

    def test_stopped_get_sends_nothing_but_the_acknowledgement(self):
        self.client.post_batch("q", ["1", "2"])
        message = self.client.get("q")
        self.stop.set()
        self.assertIsNone(self.client.get("q", stop=self.stop))
        self.assertIsNone(self.client.get("q", ack=message, stop=self.stop))
        self.assertEqual(self.broker.counters["msg-delete"], 1)
        self.assertEqual(self.client.channel_stats("q"), {"ready": 1, "hidden": 0})


class BackupCallTest(ClientCase):
    def setUp(self):
        self.options = {"dbfile": os.path.join(tempfile.mkdtemp(prefix="linger-test-"), "x.db")}
        self.addCleanup(shutil.rmtree, os.path.dirname(self.options["dbfile"]))
        super().setUp()
        self.client.post_batch("q", ["x" * 200_000] * 20)

    def test_server_starts_from_a_backup(self):
        self.client.backup(self.dbfile)
        self.assertEqual(os.stat(self.dbfile).st_mode & 0o777, 0o600)
        with linger.serve(dbfile=self.dbfile) as server, linger.Client(server.url) as client:
            self.assertEqual(client.channel_stats("q")["ready"], 20)
        with self.assertRaises(linger.Conflict):
            self.client.backup(self.dbfile)

    def test_backup_leaves_no_file_even_if_the_client_disconnects(self):
        directory = os.path.dirname(self.options["dbfile"])
        before = sorted(os.listdir(directory))
        connection = self.connect()
        connection.sendall(b"GET /backup HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertIn(b"Cache-Control: no-store", connection.recv(1000))
        self.assertEqual(sorted(os.listdir(directory)), before)
        connection.close()
        until(lambda: len(self.server.connections) == 1)
        self.assertEqual(self.call("HEAD", "/backup")[0], 405)
        self.assertEqual(len(self.call("GET", "/backup")[2]) // 4_000_000, 1)

    def test_incomplete_backup_is_removed(self):
        def fail(response, _):
            raise ZeroDivisionError
            yield response

        cut = unittest.mock.patch.object(linger.Response, "pieces", fail)
        broken = self.assertRaisesRegex(linger.Unavailable, "was lost")
        with cut, contextlib.redirect_stderr(io.StringIO()), broken:
            self.client.backup(self.dbfile)
        self.assertEqual(list(self.folder.iterdir()), [])


class Script:
    """A server that sends the next of some responses for each request, on one connection at a time.

    It closes the connection instead of a response that is None, and with `once` after each one.
    """

    def __init__(self, *responses, once=False):
        self.responses = list(responses)
        self.once = once
        self.requests = []
        self.connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections += 1
                with connection, contextlib.suppress(ConnectionError):  # reset by the client
                    self.serve(connection)

    def serve(self, connection):
        while request := connection.recv(65_536):
            self.requests.append(request)
            reply = self.responses.pop(0)
            if reply is not None:
                connection.sendall(reply)
            if reply is None or self.once:
                return

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join(PATIENCE)
        self.listener.close()


def response(status, body=b"", headers=""):
    return f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


class ConnectionTest(Folder):
    """How the client handles broken connections and bad responses."""

    POSTED = response(202, b'{"id":7}')
    UNKNOWN = response(504, b'{"error": "it is not known"}')

    def start(self, *responses, timeout=PATIENCE, once=False):
        script = Script(*responses, once=once)
        client = linger.Client(script.url, timeout=timeout)
        self.addCleanup(script.close)
        self.addCleanup(client.close)
        return script, client

    def test_request_is_one_send_on_a_kept_connection(self):
        script, client = self.start(self.POSTED, self.POSTED)
        client.post("q", "body")
        client.post("q", "body")
        self.assertTrue(script.requests[0].endswith(b"\r\n\r\nbody"))
        self.assertEqual(script.connections, 1)

    def test_idempotent_request_is_sent_again_once(self):
        for call, reply in (
            (lambda c: c.stats(), response(200, b"{}")),
            (lambda c: c.set_settings("q", hlm=1), response(204)),
            (lambda c: c.touch(1), response(204)),
            (lambda c: c.post("q", "x", dedup="k"), self.POSTED),
        ):
            for unknown in (None, self.UNKNOWN):
                script, client = self.start(unknown, reply)
                call(client)
                self.assertEqual(script.requests[0], script.requests[1])
        for unknown in (None, self.UNKNOWN):
            script, client = self.start(unknown, unknown)
            self.assertRaises(linger.Unavailable, client.stats)
            self.assertEqual(len(script.requests), 2)

    def test_a_504_to_what_must_not_be_repeated_is_an_error_and_a_delete_is_done_if_repeated(self):
        script, client = self.start(self.UNKNOWN)
        with self.assertRaisesRegex(linger.Unavailable, "not known") as caught:
            client.post("q", "x")
        self.assertEqual((caught.exception.status, len(script.requests)), (504, 1))
        script, client = self.start(self.UNKNOWN, response(404, b'{"error": "none"}'))
        client.delete(1, 1)
        self.assertEqual(len(script.requests), 2)

    def test_only_linger_says_that_a_message_is_missing_or_was_delivered_again(self):
        for status in (404, 409):
            _, client = self.start(self.UNKNOWN, response(status, b"<html>"))
            with self.assertRaisesRegex(linger.LingerError, "not as Linger does") as caught:
                client.release(1, lease=1)
            self.assertEqual((type(caught.exception), caught.exception.status),
                             (linger.LingerError, status))  # fmt: skip

    def test_other_request_is_not_sent_again_and_its_result_is_unknown(self):
        for call in (
            lambda c: c.post("q", "x"),
            lambda c: c.post_batch("q", ["x"]),
            lambda c: c.publish("t", "x"),
            lambda c: c.get("q"),
            lambda c: c.redrive("q"),
            lambda c: c.release(1),
        ):
            script, client = self.start(None)
            with self.assertRaisesRegex(linger.Unavailable, f"{script.url} was lost .* not known"):
                call(client)
            self.assertEqual(len(script.requests), 1)

    def test_post_with_retry_repeats_one_dedup_key_until_it_succeeds(self):
        busy = response(503, b'{"error":"stopping"}')
        script, client = self.start(None, None, busy, response(202, b'{"id":7,"duplicate":true}'))
        with unittest.mock.patch.object(linger, "MIN_RETRY_DELAY", 0.001):
            self.assertEqual(client.post("q", "x", retry=True), (7, False))
        self.assertEqual(len(set(script.requests)), 1)
        self.assertRegex(script.requests[0], rb"^POST /channels/q\?dedup=[0-9a-f]{32} ")

    def test_wait_for_the_server_is_logged_once_and_at_once(self):
        busy = response(503, b'{"error":"stopping"}')
        _, client = self.start(busy, busy, self.POSTED)
        self.hasten(MIN_RETRY_DELAY=0.001)
        with self.assertLogs("linger", "WARNING") as logs:
            client.post("q", "x", retry=True)
        self.assertEqual(logs.output, ["WARNING:linger:stopping; trying again for 20 s"])

    def test_retry_ends_after_the_timeout(self):
        script, client = self.start(timeout=0.2)
        script.close()
        with self.assertRaisesRegex(linger.Unavailable, "cannot connect"):
            client.post_batch("q", ["x"], retry=True)

    def test_forked_process_opens_its_own_connection(self):
        script, client = self.start(response(200, b"{}"), response(200, b"{}"))
        client.stats()
        with unittest.mock.patch("os.getpid", return_value=-1):
            client.stats()
        self.assertEqual(script.connections, 2)

    def test_connection_closed_by_the_server_is_reopened_even_for_a_post(self):
        script, client = self.start(self.POSTED, self.POSTED, once=True)
        client.post("q", "1")
        until(
            lambda: select.select([client._transport.connection()._connection.sock], [], [], 0)[0]
        )
        client.post("q", "2")
        self.assertEqual((script.connections, len(script.requests)), (2, 2))

    def test_connection_idle_for_long_is_not_used_again(self):
        self.hasten(KEEPALIVE_TIMEOUT=0.0)
        script, client = self.start(self.POSTED, self.POSTED)
        client.post("q", "1")
        client.post("q", "2")
        self.assertEqual(script.connections, 2)

    def test_message_missing_at_the_second_delete_was_deleted_by_the_first(self):
        gone = response(404, b'{"error":"there is no message 1"}')
        overtaken = response(409, b'{"error":"overtaken"}')
        self.start(None, gone)[1].delete(1)
        self.start(None, gone)[1].delete(1, lease=2)
        self.start(None, overtaken)[1].release(1, lease=2)
        self.start(None, gone)[1].reject(1, lease=2)
        for responses in ((gone,), (None, overtaken)):
            with self.assertRaises((linger.NotFound, linger.Conflict)):
                self.start(*responses)[1].delete(1, lease=2)

    def test_incomplete_response_is_an_error(self):
        for half in (
            b"HTTP/1.1 200 OK\r\nContent-Le",
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
            b"SSH-2.0-x\r\n",
        ):
            client = self.start(half, half, once=True)[1]
            with self.subTest(half), self.assertRaisesRegex(linger.Unavailable, "was lost"):
                client.stats()

    def test_response_of_another_program_is_reported(self):
        for reply in (
            response(200, b"<html>"), response(200, b"[1]"), response(200, b"{}"),
            response(404, b"<html>"), response(301, b""), response(500, b"[" * 100_000),
        ):  # fmt: skip
            client = self.start(reply)[1]
            with self.subTest(reply[:50]), self.assertRaisesRegex(linger.LingerError, "as Linger"):
                client.channels()

    def test_oversized_response_is_refused_and_its_connection_closed(self):
        with unittest.mock.patch.object(linger, "MAX_RESPONSE", 1000):
            script, client = self.start(
                response(200, b" " * 1001), response(200, b"{}" + b" " * 998)
            )
            with self.assertRaisesRegex(linger.LingerError, "more than 1000 bytes"):
                client.stats()
            self.assertEqual(client.stats(), {})
        self.assertEqual(script.connections, 2)

    def test_request_is_not_repeated_after_a_timeout(self):
        script, client = self.start(b"", timeout=0.05)
        with self.assertRaisesRegex(linger.Unavailable, "did not respond in time"):
            client.stats()
        self.assertEqual(len(script.requests), 1)

    def test_failing_loop_deletes_the_finished_message(self):
        message = linger.Message(1, "q", 0, 30, 0, 1, 0, 0, "", 1, "text/plain", b"x")
        taken = response(200, json.dumps([linger.message_object(message)]).encode())
        script, client = self.start(taken, None, response(204))
        with self.assertRaisesRegex(linger.Unavailable, "was lost"):
            for _ in client.consume("q", wait=0):
                pass
        self.assertIn(b"ack=1", script.requests[1])
        self.assertTrue(script.requests[2].startswith(b"DELETE /messages/1?lease=1 "))

    def test_interrupted_request_leaves_no_response_for_the_next(self):
        script, client = self.start(response(200, b'{"old":1}'), response(200, b'{"new":1}'))
        with unittest.mock.patch.object(linger, "_read_response", side_effect=KeyboardInterrupt):
            self.assertRaises(KeyboardInterrupt, client.stats)
        self.assertEqual(client.stats(), {"new": 1})
        self.assertEqual(script.connections, 2)

    def test_interrupt_before_the_response_closes_the_connection(self):
        files = []

        def interrupt(sock):
            files.append(sock.makefile("rb"))
            raise KeyboardInterrupt

        _, client = self.start(response(200, b"{}"), response(200, b'{"new":1}'))
        with unittest.mock.patch.object(linger.http.client, "HTTPResponse", interrupt):
            self.assertRaises(KeyboardInterrupt, client.stats)
        self.assertEqual(client.stats(), {"new": 1})  # the script has one connection at a time
        files[0].close()


class WorkerTest(ClientCase):
    """`work` and `consume`."""

    def setUp(self):
        self.hasten(HEARTBEAT_INTERVAL=0.02, STOP_CHECK_INTERVAL=0.02, MIN_RETRY_DELAY=0.01)
        super().setUp()
        self.stop = threading.Event()
        self.addCleanup(self.stop.set)

    def work(self, function, **options):
        return self.thread(lambda: self.client.work("q", function, stop=self.stop, **options))

    def counts(self, channel="q"):
        info = self.broker.info(channel)
        return info["ready"], info["in-flight"], info["delayed"]

    def test_loop_without_wait_ends_when_there_is_no_message(self):
        self.client.post_batch("q", [1, 2])
        self.assertEqual([message.json() for message in self.client.consume("q", wait=0)], [1, 2])
        self.assertEqual(self.client.channel_stats("q"), {"ready": 0, "hidden": 0})

    def test_taking_the_next_message_deletes_the_current_one(self):
        self.client.post_batch("q", ["1", "2", "3"])
        loop = self.client.consume("q", stop=self.stop)
        self.assertEqual(next(loop).text, "1")
        self.assertEqual(self.counts(), (2, 1, 0))
        self.assertEqual(next(loop).text, "2")
        self.assertEqual(self.counts(), (1, 1, 0))
        self.stop.set()
        self.assertEqual(list(loop), [])
        self.assertEqual(self.counts(), (1, 0, 0))

    def test_leaving_a_loop_releases_its_message(self):
        self.client.post("q", "x")
        for _ in self.client.consume("q"):
            self.assertEqual(self.counts(), (0, 1, 0))
            break
        self.assertEqual(self.counts(), (1, 0, 0))
        with contextlib.suppress(ZeroDivisionError):
            for _ in self.client.consume("q"):
                1 / 0  # noqa: B018
        self.assertEqual(self.counts(), (1, 0, 0))
        message = self.client.get("q")
        self.assertEqual((message.delivered, message.error[:17]), (3, "the loop was left"))

    def test_work_processes_each_message_once_in_several_threads(self):
        done, together = [], threading.Barrier(3)

        def do(message):
            if int(message.text) < 3:
                together.wait(PATIENCE)
            done.append(message.text)
            if len(done) == 30:
                self.stop.set()

        self.client.post_batch("q", [str(n) for n in range(30)])
        self.work(do, threads=3).result(PATIENCE)
        self.assertEqual(sorted(done, key=int), [str(n) for n in range(30)])
        self.assertEqual(self.counts(), (0, 0, 0))

    def test_failure_releases_the_message_with_its_traceback(self):
        def do(message):
            if message.text == "good":
                self.stop.set()
            else:
                raise ValueError("x" * 5_000 + "ü" + message.text)

        self.client.post("q", "bad")
        self.client.post("q", "slow", backoff="1000")
        self.client.post("q", "good")
        self.work(do, delay=60).result(PATIENCE)
        self.assertEqual(self.counts(), (0, 0, 2))
        bad, slow = (message for message, _ in self.client.list_messages("q"))
        self.assertEqual((bad.delay, slow.delay > 900), (60, True))
        self.assertEqual(bad.error[-5:], "übad\n")
        self.assertLessEqual(len(bad.error.encode()), linger.MAX_REASON)

    def test_function_may_settle_its_message(self):
        def do(message):
            if message.text == "reject":
                self.client.reject(message, "bad")
            elif message.text == "release":
                self.client.release(message, delay=60)
            elif message.text == "delete":
                self.client.delete_batch([message])
            else:
                self.stop.set()

        self.client.post_batch("q", ["reject", "release", "delete", "end"], dead="d")
        self.work(do).result(PATIENCE)
        self.assertEqual((self.counts(), self.counts("d")), ((0, 0, 1), (1, 0, 0)))

    def test_message_stays_in_flight_while_it_is_processed(self):
        self.hasten(TOUCHES_PER_TIMEOUT=300)

        def do(message):
            pass_touches(self.broker)
            self.stop.set()

        self.client.post("q", "x", timeout=1)
        self.work(do, timeout=30).result(PATIENCE)
        self.assertEqual(self.broker.counters["msg-timeouts"], 0)
        self.assertEqual(self.counts(), (0, 0, 0))
        self.assertEqual(self.broker.counters["delivered"], 1)

    def test_overtaken_delivery_is_left_to_the_other_consumer(self):
        def do(message):
            self.broker.release(message.id)
            self.broker.get("q")
            self.stop.set()

        self.client.post("q", "x")
        with self.assertLogs("linger", "WARNING") as logs:
            self.work(do).result(PATIENCE)
        self.assertEqual(self.counts(), (0, 1, 0))
        self.assertEqual(logs.output, [f"WARNING:linger:message 1 of q: {linger.LEASE_LOST}"])

    def test_message_is_kept_for_its_max_time_and_then_left_to_others(self):
        self.hasten(TOUCHES_PER_TIMEOUT=3_000)
        others = []

        def do(message):
            until(lambda: self.broker.counters["msg-touch"] > 2)
            with self.assertRaisesRegex(linger.Conflict, "max_time"):
                until(lambda: self.client.touch(message))
            until(lambda: logs.output)
            pass_time(self.broker, 31)
            others.append(self.client.get("q", 5))
            with self.assertRaisesRegex(linger.Conflict, "overtaken"):
                self.client.delete(message)
            self.stop.set()

        self.client.post("q", "x")
        with self.assertLogs("linger", "WARNING") as logs:
            self.work(do, max_time=0.2).result(PATIENCE)
        self.assertEqual([m.delivered for m in others], [2])
        self.assertEqual(self.counts(), (0, 1, 0))
        self.assertIn("message 1 of q has been processed for 0.2 s", logs.output[0])

    def test_consume_has_a_max_time_too(self):
        self.client.post("q", "x")
        for message in self.client.consume("q", wait=0, max_time=0.01):
            with self.assertRaisesRegex(linger.Conflict, "max_time"):
                until(lambda m=message: self.client.touch(m))
        self.assertEqual(self.counts(), (0, 0, 0))
        with self.assertRaisesRegex(linger.BadRequest, "max_time"):
            next(self.client.consume("q", max_time=0))

    def test_exception_is_logged_with_its_traceback(self):
        def do(message):
            self.stop.set()
            raise ZeroDivisionError

        self.client.post("q", "x")
        with self.assertLogs("linger", "WARNING") as logs:
            self.work(do).result(PATIENCE)
        (record,) = logs.records
        self.assertEqual(
            (record.levelname, record.getMessage()), ("ERROR", "message 1 of q failed")
        )
        self.assertIs(record.exc_info[0], ZeroDivisionError)

    def test_outage_and_its_end_are_logged_once_for_all_threads(self):
        errors = [linger.Unavailable("away"), linger.Unavailable("away"), linger.Unavailable("no")]
        take = self.client.get

        def fail_thrice(*arguments, **options):
            if errors:
                raise errors.pop(0)
            return take(*arguments, **options)

        self.client.get = fail_thrice
        with self.assertLogs("linger", "WARNING") as logs:
            work = self.work(print, threads=2)
            until(lambda: count_waiting(self.broker) == 2)
            self.stop.set()
            work.result(PATIENCE)
        lines = ["WARNING:linger:away; trying again", f"WARNING:linger:{linger.SERVER_IS_BACK}"]
        self.assertEqual(logs.output, lines)

    def test_work_that_the_system_allows_no_thread_raises_and_leaves_none(self):
        start = threading.Thread.start
        started = itertools.count()

        def start_one(thread):
            if thread.name != "linger-heartbeat" and next(started):
                raise RuntimeError("can't start new thread")
            start(thread)

        before = threading.active_count()
        with unittest.mock.patch.object(threading.Thread, "start", start_one):
            self.assertRaises(RuntimeError, self.client.work, "q", print, threads=2)
        until(lambda: threading.active_count() <= before)

    def test_waiting_worker_ends_on_stop_and_takes_no_message(self):
        work = self.work(print, threads=2)
        until(lambda: self.broker.info("q")["waiting"] == 2)
        self.stop.set()
        work.result(PATIENCE)
        self.client.post("q", "x")
        self.assertEqual(self.client.read_message(1)[1], "ready")

    def test_the_number_of_threads_is_checked(self):
        for threads in (0, -1, 1.5):
            with self.subTest(threads=threads), self.assertRaises(linger.BadRequest):
                self.client.work("q", print, threads=threads, wait=0)

    def test_permanent_error_is_raised(self):
        with self.assertRaises(linger.BadRequest):
            self.client.work("", print, threads=2)
        with self.assertRaises(linger.BadRequest):
            next(self.client.consume(""))
        with self.assertRaises(SystemExit):
            self.client.post("q", "x")
            self.client.work("q", lambda _: sys.exit())
        self.assertEqual(self.counts()[1:], (0, 1))

    def test_failed_loop_leaves_no_connection(self):
        def lines():
            return sum(isinstance(thing, linger._HTTPConnection) for thing in gc.get_objects())

        gc.disable()
        self.addCleanup(gc.enable)
        before = lines()
        with contextlib.suppress(linger.BadRequest):  # assertRaises would clear its frames
            self.client.work("", print, threads=2)
        self.assertEqual(lines(), before)

    def test_closing_the_client_ends_its_loops(self):
        work = self.work(print)
        until(lambda: self.broker.info("q")["waiting"])
        self.client.close()
        self.assertRaises(linger.Unavailable, work.result, PATIENCE)


class OtherSystemTest(Folder):
    """On a system that is not POSIX, such as Windows: the client works, the server says why not."""

    LINGER = """
import os, select, signal, socket, sys

sys.modules.update(fcntl=None, resource=None)
for module, names in (
    (os, "EX_TEMPFAIL environb fork killpg register_at_fork sched_yield set_blocking statvfs"),
    (select, "POLLERR POLLHUP POLLIN POLLRDHUP epoll poll"),
    (signal, "SIGHUP SIGKILL SIGPIPE pthread_sigmask"),
    (socket, "AF_UNIX MSG_DONTWAIT"),
):
    for name in names.split():
        vars(module).pop(name, None)
import linger
"""
    REFUSAL = " needs a POSIX system such as Linux or macOS\n"

    def run_there(self, program, *arguments):
        """Runs a program that has imported linger; returns its exit status, output and errors."""
        ended = run_python(self.LINGER + program, *arguments)
        return ended.returncode, ended.stdout, ended.stderr

    def test_client_works(self):
        program = """
with linger.Client(sys.argv[1]) as client:
    client.post_batch("q", ["1", "2", "3"])
    client.delete(client.get("q", 0))
    client.work("q", lambda message: print(message.text), wait=0)
    client.backup(sys.argv[2])
"""
        backup = str(self.folder / "backup")
        with linger.serve() as server:
            ended = self.run_there(program, server.url, backup)
        self.assertEqual(ended, (0, "2\n3\n", ""))
        self.assertGreater(os.path.getsize(backup), 0)

    def test_commands_work(self):
        program = """
for _ in range(2):
    print(linger.main(["get", "q", "--url", sys.argv[1]]))
"""
        with linger.serve() as server:
            server.broker.post("q", b"x")
            self.assertEqual(self.run_there(program, server.url), (0, "x0\n1\n", ""))

    def test_what_needs_a_posix_system_says_so_in_one_line(self):
        program = """
for arguments in (
    ["--port", "0", "--dbfile", sys.argv[1]], ["work", "q", "--", "true"], ["bench"]
):
    print(linger.main(arguments))
"""
        lines = (
            f"linger: {name}{self.REFUSAL}"
            for name in ("a server of Linger", "linger work", "linger bench")
        )
        ended = self.run_there(program, self.dbfile)
        self.assertEqual(ended, (0, "2\n2\n2\n", "".join(lines)))
        self.assertEqual(os.listdir(self.folder), [])

    def test_embedded_server_is_refused_with_that_reason(self):
        status, _, errors = self.run_there("linger.serve()")
        self.assertEqual(status, 1)
        self.assertTrue(errors.endswith(f"Unavailable: a server of Linger{self.REFUSAL}"), errors)


class Process:
    """A real `python linger.py` on a port of its own choice."""

    def __init__(
        self, *arguments, program=(), environment=None, before=None, strict=True, errors=None
    ):
        """Standard error goes to a file `errors`, or is what `end` returns."""
        strictly = STRICT if strict else ()
        self.process = subprocess.Popen(
            [sys.executable, *strictly, *(program or [compiled]), *arguments],
            stdout=subprocess.PIPE,
            stderr=errors or subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            preexec_fn=before,
            text=True,
        )
        self.line = self.process.stdout.readline()
        found = re.search(r"http://[^ ,]*:([0-9]+)", self.line)
        self.port = int(found[1]) if found else None

    def call(self, method, path, body=None, headers=None):
        with self.session() as call:
            return call(method, path, body, headers)

    @contextlib.contextmanager
    def session(self):
        """Yields `call` with a connection that it keeps."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

        def call(method, path, body=None, headers=None):
            return exchange(client, method, path, body, headers or {"Content-Type": "x/y"})

        with contextlib.closing(client):
            yield call

    def end(self, number=signal.SIGTERM):
        """Sends a signal; the exit status and what was written to standard error."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors


class ProcessCase(Folder):
    def start(self, *arguments, **options):
        server = Process("--port", "0", "--dbfile", self.dbfile, *arguments, **options)
        self.addCleanup(server.end, signal.SIGKILL)
        return server


@unittest.skipUnless(hasattr(sys, "orig_argv"), "a script hands over since Python 3.10")
class CompiledTest(Folder):
    """A server that is started as a script runs the compiled file, which is never an old one."""

    def setUp(self):
        super().setUp()
        self.script = self.folder / "linger.py"
        start, found, _ = SOURCE.partition("\nimport _thread\n")  # or it would compile all, 5 times
        self.assertTrue(found)
        self.script.write_text(f'{start}\nprint("{linger.__version__}")\n')

    def version(self):
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": ""}
        command = [sys.executable, self.script, "--version"]
        return subprocess.run(command, capture_output=True, text=True, env=environment).stdout

    def replace(self, path, old, new):
        status = path.stat()
        path.write_bytes(path.read_bytes().replace(old, new))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def test_the_compiled_file_is_run_until_the_source_is_edited(self):
        version = linger.__version__.encode()
        self.assertIn(linger.__version__, self.version())
        (compiled,) = (self.folder / "__pycache__").iterdir()
        self.replace(compiled, version, b"9.9.9")
        self.assertIn("9.9.9", self.version())
        self.replace(self.script, version, b"8.8.8")  # of the same size and time
        self.assertIn("8.8.8", self.version())

    def test_a_script_is_run_where_nothing_can_be_written_beside_it(self):
        (self.folder / "__pycache__").touch()
        self.assertIn(linger.__version__, self.version())


class ProcessTest(ProcessCase):
    def refused(self, *arguments, **options):
        """What a server that does not start writes: one line, and exit status 2."""
        server = self.start(*arguments, **options)
        status, errors = server.end()
        self.assertEqual((status, server.line), (2, ""))
        self.assertEqual(errors.count("\n"), 1, errors)
        return errors

    def test_it_says_where_it_listens_the_path_of_its_database_and_how_hard_it_syncs(self):
        here = os.getcwd()
        os.chdir(self.folder)
        self.addCleanup(os.chdir, here)
        self.dbfile = "x.db"
        server = self.start()
        self.assertEqual(
            server.line,
            f"Linger {linger.__version__} listening on http://127.0.0.1:{server.port},"
            f" messages kept in {os.path.join(os.getcwd(), self.dbfile)} (sync full)\n",
        )

    def test_posts_are_done_while_a_redrive_and_a_drain_of_many_messages_work(self):
        server = self.start("--sync=off")
        client = linger.Client(f"http://127.0.0.1:{server.port}")
        for _ in range(10):
            client.post_batch("failed", ["x"] * 1_000)
        for call in (lambda: client.redrive("failed", to="q"), lambda: client.drain("q")):
            ended = self.thread(call)
            posts = 0
            while not ended.done():
                client.post("other", "x")
                posts += 1
            ended.result()
            self.assertGreater(posts, 2)

    def test_it_runs_as_a_module_of_the_folder_that_it_is_in(self):
        command = (sys.executable, *STRICT, "-m", "linger", "--version")
        output = subprocess.check_output(command, cwd=os.path.dirname(compiled), text=True)
        self.assertEqual(output, f"Linger {linger.__version__}\n")

    def test_sigterm_and_sigint_stop_it_in_good_order_also_while_consumers_wait(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                server = self.start()
                server.call("POST", "/channels/q", "x")
                with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as waiting:
                    waiting.sendall(b"GET /channels/empty HTTP/1.0\r\n\r\n")
                    until(lambda s=server: b"empty" in s.call("GET", "/channels")[2])
                    start = time.monotonic()
                    self.assertEqual(server.end(number), (0, ""))
                    self.assertLess(time.monotonic() - start, 5)
                    self.assertTrue(waiting.recv(1000).startswith(b"HTTP/1.1 204 "))
                self.assertFalse(os.path.exists(self.dbfile + "-wal"))

    @unittest.skipUnless(os.path.exists("/dev/full"), "a full disk to write to")
    def test_it_starts_without_standard_streams_and_with_a_full_disk_for_its_output(self):
        path = self.folder / "socket"
        url = f"http+unix://{urllib.parse.quote(str(path), safe='')}"
        for streams in ("<&- >&- 2>&-", ">/dev/full 2>/dev/full"):
            arguments = (compiled, "--host", f"unix:{path}", "--dbfile", self.dbfile)
            process = subprocess.Popen(
                ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, *STRICT, *arguments]
            )
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
            with linger.Client(url) as client:
                until(client.health)
                self.assertEqual(client.post("q", "x").duplicate, False)
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)

    @unittest.skipUnless(sys.platform == "linux", "the threads of a process are in /proc")
    def test_a_signal_that_another_thread_gets_stops_it_too(self):
        server = self.start()
        pid = server.process.pid
        threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
        os.kill(next(thread for thread in threads if thread != pid), signal.SIGTERM)
        self.assertEqual(server.process.wait(PATIENCE), 0)

    def test_options_come_from_the_command_line_then_the_environment_then_a_file(self):
        config = self.folder / "linger.conf"
        config.write_text(
            "# as for Linger 1.0.1\n[linger]\nhlm = 3\nmax_message = '10'  # bytes\ndebug = True\n"
        )
        server = self.start(
            f"--config={config}", "--max-message=5", environment={"LINGER_MAX_MESSAGE": "7"}
        )
        self.assertEqual(server.call("POST", "/channels/q", b"x" * 5)[0], 202)
        self.assertEqual(server.call("POST", "/channels/q", b"x" * 6)[0], 413)
        for status in (202, 202, 507):
            self.assertEqual(server.call("POST", "/channels/q", b"x")[0], status)
        self.assertIn("POST /channels/q 507", server.end()[1])

    def test_variables_of_a_service_named_linger_are_ignored(self):
        address = "tcp://10.96.0.10:8989"
        variables = {
            "LINGER_PORT": address, "LINGER_SERVICE_HOST": "10.96.0.10",
            "LINGER_SERVICE_PORT": "8989", "LINGER_SERVICE_PORT_HTTP": "8989",
            "LINGER_PORT_8989_TCP": address, "LINGER_PORT_8989_TCP_PROTO": "tcp",
            "LINGER_PORT_8989_TCP_PORT": "8989", "LINGER_PORT_8989_TCP_ADDR": "10.96.0.10",
        }  # fmt: skip
        options = linger.read_options([], variables)
        self.assertEqual(options, linger.read_options([], {}))
        for address in ("tcp://[fd00::1]:53", "udp://10.0.0.1:53", "sctp://10.0.0.1:9"):
            self.assertEqual(linger.read_options([], {"LINGER_PORT": address})["port"], 8989)
        for text in ("x", "tcp://", "http://10.0.0.1:8989", ""):
            with self.subTest(text), self.assertRaisesRegex(linger.BadRequest, "LINGER_PORT"):
                linger.read_options([], {"LINGER_PORT": text})
        with self.assertRaisesRegex(linger.BadRequest, "--port"):
            linger.read_options(["--port", variables["LINGER_PORT"]], {})

    def test_bounds_are_given_by_options(self):
        server = self.start(
            "--max-channels=1", "--max-waiting=1", "--max-db-size=2000000", "--idle-timeout=1",
            "--max-connections-per-address=2",
        )  # fmt: skip
        idle = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
        self.addCleanup(idle.close)
        self.assertEqual(server.call("POST", "/channels/q", "x")[0], 202)
        # 503 until the server has seen that the connection of the call before is closed
        until(lambda: server.call("POST", "/channels/r", "x")[0] == 507)
        self.assertEqual(idle.recv(1), b"")
        waiting = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
        self.addCleanup(waiting.close)
        waiting.sendall(b"GET /channels/r HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: b'"r"' in server.call("GET", "/channels")[2])
        self.assertEqual(server.call("GET", "/channels/r")[0], 503)
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE):
            self.assertEqual(server.call("GET", "/topics")[0], 503)
        until(lambda: server.call("GET", "/topics")[0] == 200)
        large = b"x" * 200_000
        until(lambda: b"its limit of 2000000" in server.call("POST", "/channels/q", large)[2])

    def test_names_are_never_files_and_what_is_made_is_for_its_owner_only(self):
        server = self.start(before=lambda: os.umask(0))
        for name in ("../../x", "/etc/passwd", "..", "linger.db", "x/y", "~"):
            path = "/channels/" + urllib.parse.quote(name, safe="")
            self.assertEqual(server.call("POST", path, name)[0], 202)
            self.assertEqual(server.call("GET", path)[2], name.encode())
        found = {path.name: path.stat().st_mode & 0o777 for path in self.folder.iterdir()}
        suffixes = ("", "-lock", "-reserve", "-shm", "-wal")
        files = [f"linger.db{suffix}" for suffix in suffixes]
        self.assertEqual(found, dict.fromkeys(files, 0o600))

    def test_what_cannot_start_says_why_in_one_line(self):
        self.assertIn("--nonsense", self.refused("serve", "--nonsense"))
        self.assertIn("LINGER_HLM", self.refused(environment={"LINGER_HLM": "x"}))

    def test_options_and_files_that_cannot_be_are_refused(self):
        """In this process, which must keep its own settings, and serve nobody if it does start."""
        self.hasten(_tune_threads=bool, _raise_file_limit=int)
        serving = unittest.mock.patch.object(linger.Server, "serve_forever", side_effect=OSError)
        serving.start()
        self.addCleanup(serving.stop)
        config = self.folder / "bad.conf"
        config.write_text("import os\n")
        quoted = self.folder / "quoted.conf"
        quoted.write_text("dbfile = 'linger.db\n")
        busy = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(busy.close)
        for arguments, reason in (
            (["--hlm=-1"], "--hlm"),
            ([f"--port={busy.getsockname()[1]}"], "in use"),
            (["--host=203.0.113.1"], "cannot listen"),
            (["--host=0.0.0.0"], "--no-auth"),
            (["--port=x"], "--port"),
            (["--port=70000"], "65535"),
            (["--sync=maybe"], "full, normal, off"),
            (["--dbfile=/no/such/folder/x.db"], "No such file"),
            ([f"--dbfile={self.folder}"], "directory"),
            ([f"--dbfile={config}"], "not a database"),
            ([f"--config={config}"], "line 1"),
            ([f"--config={quoted}"], "line 1: the quotes of the value do not match"),
            (["--config=/no/such/file"], "cannot read /no/such/file: No such file or directory\n"),
            (["--no-auth", "--token=T0ken"], "no-auth gives everybody access"),
        ):
            with self.subTest(arguments), unittest.mock.patch.object(os, "umask"):
                status, output, errors = run_command("", "--port=0", *arguments)
                self.assertEqual((status, output, errors.count("\n")), (2, b"", 1), errors)
                self.assertIn(reason, errors)

    def test_two_servers_on_one_file_are_refused(self):
        self.start()
        self.assertIn("in use by another Linger", self.refused())

    def test_a_stop_without_its_database_is_one_line_and_no_traceback(self):
        server = self.start()
        os.unlink(self.dbfile)
        status, errors = server.end()
        self.assertEqual(status, 0)
        self.assertRegex(errors, r"^linger: .* deleted or replaced .*\n$")

    def test_lines_that_threads_log_at_the_same_time_do_not_mix(self):
        program = """
import linger, threading
def log_many():
    for _ in range(500):
        linger.log("one whole line")
threads = [threading.Thread(target=log_many) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
        self.assertEqual(set(run_python(program).stderr.split("\n")), {"one whole line", ""})

    def test_a_low_limit_of_open_files_is_logged_and_lowers_max_connections(self):
        def lower():
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

        server = self.start(before=lower)
        self.assertEqual(server.call("GET", "/topics")[0], 200)
        self.assertIn("only 32 connections", server.end()[1])

    def test_without_tokens_it_listens_on_loopback_only_unless_no_auth_is_given(self):
        self.start("--host=0.0.0.0", "--no-auth").end()
        self.start("--host=0.0.0.0", environment={"LINGER_TOKEN": "T0ken"}).end()
        said = self.refused(environment={"LINGER_TOKEN": "my s3cret"})
        self.assertIn("visible ASCII", said)
        self.assertNotIn("s3cret", said)

    def test_sighup_reads_the_tokens_anew_and_a_broken_file_keeps_the_old(self):
        tokens = self.write_tokens("a 0ld read")
        server = self.start(f"--tokens={tokens}")
        until(lambda: server.call("GET", "/topics", headers=bearer("0ld"))[0] == 200)
        lines = []
        for text in ("a n3w read", "a n3wer"):
            tokens.write_text(text)
            server.process.send_signal(signal.SIGHUP)
            lines.append(server.process.stderr.readline())
            until(lambda: server.call("GET", "/topics", headers=bearer("n3w"))[0] == 200)
            self.assertEqual(server.call("GET", "/topics", headers=bearer("0ld"))[0], 401)
        self.assertEqual(server.end(), (0, ""))
        self.assertRegex(lines[0], "^linger: the files of tokens .* were read again\n$")
        self.assertRegex(lines[1], "^linger: .*tokens, line 1: .*still holds\n$")

    def test_request_log_has_the_time_and_the_name_of_the_token(self):
        tokens = self.write_tokens("shop s3cret write\nall 4ll read,write,admin\n")
        server = self.start(f"--tokens={tokens}", "--log-requests")
        start = time.time()
        server.call("POST", "/channels/q", "x", {"Content-Type": "x/y", **bearer("s3cret")})
        server.call("GET", "/stats", headers=bearer("4ll"))
        server.call("GET", "/channels/q", headers=bearer("wrong"))
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            while connection.recv(1_000):
                pass
        _, errors = server.end()
        lines = [line.split(" ") for line in errors.splitlines()]
        expected = [
            ["127.0.0.1", "shop", "POST", "/channels/q", "202"],
            ["127.0.0.1", "all", "GET", "/stats", "200"],
            ["127.0.0.1", "-", "GET", "/channels/q", "401"],
            ["127.0.0.1", "-", "-", "-", "400"],
        ]
        self.assertCountEqual([line[1:6] for line in lines], expected, errors)
        for line in lines:
            then = datetime.datetime.strptime(line[0], "%Y-%m-%dT%H:%M:%S.%fZ")
            then = then.replace(tzinfo=datetime.timezone.utc).timestamp()
            self.assertLessEqual(start - 0.001, then)
            self.assertLessEqual(then, time.time())
        self.assertNotIn("s3cret", errors)

    @unittest.skipUnless(sys.platform == "linux", "other systems refuse such names")
    def test_paths_that_are_not_utf_8_work_everywhere(self):
        folder = os.fsencode(self.folder) + b"/\xff \xe4?#%"
        os.mkdir(folder)
        self.dbfile = os.fsdecode(folder + b"/\xfe.db")
        config = os.fsdecode(folder + b"/\xfd.conf")
        with open(os.fsencode(config), "wb") as file:
            file.write(b"dbfile = '" + os.fsencode(self.dbfile) + b"'\n")
        server = self.start("--config", config, environment={"PYTHONIOENCODING": "ascii"})
        self.assertIn(r"\udcfe.db", server.line)
        self.assertIn(r"\udcfe.db is in use", self.refused())
        self.assertEqual(server.call("POST", "/channels/q", "x")[0], 202)
        stats = json.loads(server.call("GET", "/stats")[2])
        self.assertEqual(stats["db-file"], self.dbfile)
        copy = folder + b"/copy \xfc.db"
        url = f"http://127.0.0.1:{server.port}"
        self.assertEqual(run_command(url, "backup", os.fsdecode(copy))[0], 0)
        errors = run_command(url, "backup", os.fsdecode(copy))[2]
        self.assertIn(r"already a file", errors)
        self.assertIn(r"\udcfc.db", errors)
        self.assertIn(b"\\udcfe.db", run_command(url, "stats", "--json")[1])
        self.assertEqual(server.end(), (0, ""))
        for path in (copy, os.fsencode(self.dbfile)):
            with contextlib.closing(linger.Store(os.fsdecode(path))) as store:
                self.assertEqual(store.read("select count(*) from messages"), [[(1,)]])
        with open(copy, "wb") as file:
            file.write(b"text" * 99)
        self.dbfile = os.fsdecode(copy)
        self.assertIn("not a database", self.refused())
        os.unlink(copy)
        connection = sqlite3.connect(copy)
        connection.executescript(V1_DATABASE)
        connection.close()
        self.start().end()
        self.assertTrue(os.path.exists(copy + b".v1"))

    def test_a_database_in_memory_keeps_nothing(self):
        server = self.start("--dbfile=:memory:")
        self.assertIn("memory only", server.line)
        self.assertEqual(server.call("POST", "/channels/q", "x")[0], 202)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_it_runs_from_its_source(self):
        command = (sys.executable, *STRICT, str(HERE / "linger.py"), "--version")
        output = subprocess.check_output(command, text=True)
        self.assertEqual(output, f"Linger {linger.__version__}\n")

    def test_a_file_size_limit_is_an_error_with_a_sentence_and_passes(self):
        server = self.start()
        resource.prlimit(
            server.process.pid, resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY)
        )
        stored = []
        while True:
            status, _, body = server.call("POST", "/channels/q", b"x" * 20_000)
            if status != 202:
                break
            stored.append(json.loads(body)["id"])
        self.assertIn(status, (503, 507))
        self.assertIn("nothing was changed", json.loads(body)["error"])
        self.assertEqual(server.call("GET", "/topics")[0], 200)
        resource.prlimit(
            server.process.pid,
            resource.RLIMIT_FSIZE,
            (resource.RLIM_INFINITY, resource.RLIM_INFINITY),
        )
        self.assertEqual(server.call("POST", "/channels/q", b"x")[0], 202)
        for id in stored:
            _, headers, body = server.call("GET", "/channels/q")
            self.assertEqual((int(headers["x-linger-msg-id"]), len(body)), (id, 20_000))
        self.assertEqual(server.end(), (0, ""))

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which("mount"), "needs root to mount a file")
    def test_database_that_is_a_mount_point_is_refused_and_nothing_made_beside_it(self):
        outside, inside = self.folder / "outside", self.folder / "inside \\040"
        for folder in (outside, inside):
            folder.mkdir()
            (folder / "q.db").touch()
        self.dbfile = str(inside / "q.db")
        command = ["mount", "--bind", str(outside / "q.db"), self.dbfile]
        if subprocess.run(command, capture_output=True).returncode:
            self.skipTest("cannot mount a file here")
        self.addCleanup(subprocess.run, ["umount", "-l", self.dbfile])
        os.symlink(self.dbfile, self.folder / "link.db")
        for path in (self.dbfile, str(self.folder / "link.db")):
            self.dbfile = path
            self.assertIn(f"mount its folder {inside} instead", self.refused())
        self.assertEqual([path.name for path in inside.iterdir()], ["q.db"])
        self.assertEqual((outside / "q.db").read_bytes(), b"")

    def test_at_the_largest_file_size_takes_and_deletes_go_on_and_posts_fit_again(self):
        server = self.start()
        limit = (3_000_000, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limit)
        stored = self.fill(server, 50_000)
        self.assertGreater(len(stored), 20)
        self.empty(server, stored)
        for _ in range(3):
            self.assertEqual(server.call("POST", "/channels/q", b"x" * 50_000)[0], 202)
        self.assertEqual(server.end(), (0, ""))

    def fill(self, server, size, clients=1):
        """Posts from several threads until there is no room; the ids."""

        def post():
            stored, refused = [], 0
            with server.session() as call:
                while refused < 10:
                    status, _, body = call("POST", "/channels/q", b"x" * size)
                    self.assertIn(status, (202, 507), body)
                    refused = refused + 1 if status == 507 else 0
                    stored += [json.loads(body)["id"]] if status == 202 else []
            return stored

        threads = [self.thread(post) for _ in range(clients)]
        return sorted(id for thread in threads for id in thread.result(10 * PATIENCE))

    def empty(self, server, stored):
        """Takes and deletes all messages, of which none may be missing or refused."""
        with server.session() as call:
            ack = ""
            for id in stored:
                status, headers, body = call("GET", f"/channels/q?nowait{ack}")
                self.assertEqual((status, headers["x-linger-msg-id"]), (200, str(id)), body)
                ack = f"&ack={id}"
            self.assertEqual(call("DELETE", f"/messages/{id}")[0], 204)
            self.assertEqual(call("GET", "/channels/q?nowait")[0], 204)

    def mount(self, size):
        """Puts the database on a disk of its own."""
        if os.geteuid() or not shutil.which("mount"):
            self.skipTest("needs root to mount a disk")
        disk = Path(tempfile.mkdtemp(dir=self.folder))
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            self.skipTest("cannot mount a disk here")
        self.addCleanup(subprocess.run, ["umount", "-l", str(disk)])
        self.dbfile = str(disk / "linger.db")
        return disk

    def test_a_disk_that_fast_posts_fill_can_be_emptied_also_after_a_kill(self):
        for size, clients in ((2_000, 8), (250_000, 8)):
            with self.subTest(size=size, clients=clients):
                self.mount(4)
                server = self.start()
                stored = self.fill(server, size, clients)
                self.assertEqual(server.call("GET", "/health")[0], 503)
                server.end(signal.SIGKILL)
                server = self.start()
                self.empty(server, stored)
                self.assertEqual(server.call("POST", "/channels/q", b"x" * size)[0], 202)
                status, errors = server.end()
                self.assertEqual(status, 0)
                self.assertRegex(errors, "^linger: the disk is full.*\nlinger: there is room.*\n$")

    def test_another_program_that_fills_the_disk_to_the_last_byte_stops_only_posts(self):
        disk = self.mount(8)
        server = self.start()
        stored = []
        for _ in range(40):
            body = server.call("POST", "/channels/q", b"x" * 50_000)[2]
            stored.append(json.loads(body)["id"])
        with contextlib.suppress(OSError), open(disk / "other", "wb", buffering=0) as other:
            while True:
                other.write(bytes(4096))
        self.assertEqual(os.statvfs(disk).f_bavail, 0)
        self.fill(server, 50_000)
        self.empty(server, stored)
        self.assertEqual(server.call("POST", "/channels/q", b"x" * 50_000)[0], 202)

    def test_on_a_full_disk_messages_can_be_taken_and_deleted_but_none_added(self):
        self.mount(8)
        server = self.start()
        self.addCleanup(server.end)
        with server.session() as call:
            self.empty(server, self.fill(server, 100_000))
            for _ in range(60):  # more than the disk holds
                status, _, body = call("POST", "/channels/q", b"x" * 250_000)
                self.assertEqual(status, 202)
                self.assertEqual(call("DELETE", f"/messages/{json.loads(body)['id']}")[0], 204)
            self.fill(server, 100_000)
            self.assertEqual(call("GET", "/health")[0], 503)
            self.assertEqual(call("DELETE", "/channels/q")[0], 204)
        server.end()
        server = self.start()
        self.assertEqual(server.call("GET", "/channels/q/stats")[2], b'{"ready":0,"hidden":0}\n')


FORKING = """
import os, sys, linger
server = linger.serve(dbfile=sys.argv[1])
store = server.broker._store
server.broker.post("q", b"x")
if os.fork() == 0:
    said = []
    for call in (
        lambda: server.broker.post("q", b"y"),
        lambda: server.broker.get("q"),
        lambda: store.read("select 1"),
        lambda: store.copy("never"),
        lambda: store.transact([]),
    ):
        try:
            call()
        except linger.Unavailable as error:
            said.append("forked" in str(error))
        except linger.TransactionFailed as error:
            said.append("forked" in str(error))
    server.close()
    print(*said, flush=True)
    sys.stdin.read()
    sys.exit()
print(server.url, flush=True)
sys.stdin.read()
"""


class ForkTest(ProcessCase):
    """A child of a program that has a server."""

    def test_a_child_keeps_neither_the_lock_nor_the_sockets_and_gets_errors(self):
        program = subprocess.Popen(
            [sys.executable, "-c", FORKING, self.dbfile],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=HERE, text=True,
        )  # fmt: skip
        self.addCleanup(program.communicate)  # its end ends the child
        lines = sorted(program.stdout.readline().strip() for _ in range(2))
        self.assertEqual(lines[0], " ".join(["True"] * 5))
        port = int(lines[1].rpartition(":")[2])
        with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as open_one:
            program.kill()
            program.wait()
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(open_one.recv(1), b"")
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        server = self.start()
        self.assertEqual(server.call("GET", "/channels/q?nowait")[2], b"x")


class NotifyTest(ProcessCase):
    """What a server says to the service manager that has started it."""

    def setUp(self):
        super().setUp()
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.manager.close)
        self.manager.settimeout(PATIENCE)

    def listen(self, address):
        self.manager.bind(re.sub("^@", "\0", address))
        return {"NOTIFY_SOCKET": address}

    def said(self):
        return self.manager.recv(1_000).decode()

    def test_it_is_ready_when_it_listens_reloads_and_stops(self):
        tokens = self.write_tokens("me s3cret read")
        name = f"@linger-test-{os.getpid()}-{time.monotonic_ns()}"
        server = self.start(
            f"--tokens={tokens}", "--dbfile=:memory:", environment=self.listen(name)
        )
        self.assertEqual(
            self.said(), f"READY=1\nSTATUS=listening on http://127.0.0.1:{server.port}"
        )
        server.process.send_signal(signal.SIGHUP)
        self.assertRegex(self.said(), r"^RELOADING=1\nMONOTONIC_USEC=[0-9]+$")
        self.assertEqual(self.said(), "READY=1")
        server.end()
        self.assertEqual(self.said(), "STOPPING=1")

    def test_it_gives_signs_of_life_if_the_unit_asks_for_them(self):
        environment = self.listen(str(self.folder / "notify"))
        self.start("--dbfile=:memory:", environment={**environment, "WATCHDOG_USEC": "30000"})
        self.said()
        self.assertEqual([self.said() for _ in range(3)], ["WATCHDOG=1"] * 3)

    def test_a_process_of_another_number_is_not_watched(self):
        environment = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
        self.assertEqual(linger.ServiceManager(environment).watchdog, 0)

    def test_nobody_who_listens_is_no_error(self):
        linger.ServiceManager({}).notify("READY=1")
        linger.ServiceManager({"NOTIFY_SOCKET": "/nowhere"}).notify("READY=1")

    def test_a_stuck_committer_or_ticker_gives_no_sign_of_life(self):
        manager = linger.ServiceManager({**self.listen(str(self.folder / "notify")),
                                         "WATCHDOG_USEC": "20000000"})  # fmt: skip
        with linger.serve() as server:
            timers = server.broker._state.timers
            with busy(server.broker._committer):
                watch = self.thread(manager.watch, server)
                until(lambda: len(server.broker._committer._pending))
                self.assertEqual(select.select([self.manager], [], [], 0)[0], [])
            self.assertEqual(self.said(), "WATCHDOG=1")
            server.stopping = True
            server._stopped.set()
            watch.result(PATIENCE)
            server.stopping = False
            with (
                unittest.mock.patch.object(timers, "has_ticked", lambda seconds: False),
                unittest.mock.patch.object(linger, "log") as log,
            ):
                manager.watch(server)
            self.assertIn("the ticker is stuck", log.call_args[0][0])
            self.assertEqual(select.select([self.manager], [], [], 0)[0], [])


class HangUpTest(ProcessCase):
    """SIGHUP where there is nothing to read again."""

    def setUp(self):
        super().setUp()
        handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
        self.addCleanup(signal.signal, signal.SIGHUP, handler)

    def test_without_a_terminal_it_is_logged_and_the_server_goes_on(self):
        server = self.start(before=os.setsid)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: select.select([server.process.stderr], [], [], 0)[0])
        self.assertEqual(server.call("GET", "/health")[0], 200)
        status, errors = server.end()
        self.assertEqual(status, 0)
        self.assertRegex(errors, "^linger: SIGHUP: there are no files .*\n$")

    def test_a_terminal_that_is_closed_stops_it_gracefully(self):
        main, terminal = os.openpty()

        def take_terminal():
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        with contextlib.closing(os.fdopen(main)):
            server = self.start(before=take_terminal)
            os.close(terminal)
            self.assertEqual(server.call("POST", "/channels/q", b"x")[0], 202)
        status, errors = server.process.wait(PATIENCE), server.end()[1]
        self.assertEqual((status, errors), (0, ""))
        self.assertFalse(os.path.exists(self.dbfile + "-wal"))


@unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs Linux")
class AttackTest(ProcessCase):
    """Who means ill: memory, threads and descriptors stay bounded and come back, and a normal
    client is served within a second meanwhile."""

    many = int(os.environ.get("LINGER_TEST_ATTACKERS", "200"))  # connections of an attack
    SLACK = 16  # threads and descriptors more than at rest
    GROWTH = 32_000_000  # bytes of memory more than at rest, and for each connection those of
    HEAD = 160_000  # a head, which are kept while more is received

    def setUp(self):
        super().setUp()
        options = ("--read-timeout=1", "--idle-timeout=60", f"--max-waiting={2 * self.many}")
        # not strict: that fills memory which was allocated and not used
        self.server = self.start("--sync=off", "--allow-host=x", *options, strict=False)
        self.assertEqual(self.server.call("GET", "/topics")[0], 200)
        self.connections = []
        self.addCleanup(self.disconnect)
        self.base = self.usage()

    def usage(self):
        """Threads, descriptors and bytes of memory of the server."""
        process = f"/proc/{self.server.process.pid}"
        status = Path(process, "status").read_text()
        threads, memory = (
            int(re.search(rf"{name}:\s+([0-9]+)", status)[1]) for name in ("Threads", "VmRSS")
        )
        return threads, len(os.listdir(f"{process}/fd")), memory * 1024

    def attack(self, data, count=None):
        """Opens many connections that send some bytes, then are silent."""
        for _ in range(count or self.many):
            connection = socket.create_connection(("127.0.0.1", self.server.port), PATIENCE)
            self.connections.append(connection)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.send(data)

    def disconnect(self, reset=False):
        while self.connections:
            connection = self.connections.pop()
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()

    def await_threads(self, count):
        until(lambda: self.usage()[0] >= self.base[0] + count - 1)

    def check_service(self):
        """That a normal client is served in time, and the memory is bounded."""
        start = time.monotonic()
        self.assertEqual(self.server.call("POST", "/channels/normal", b"x")[0], 202)
        self.assertEqual(self.server.call("GET", "/channels/normal?auto")[2], b"x")
        self.assertLess(time.monotonic() - start, 1)
        self.assertLess(self.usage()[2], self.base[2] + self.GROWTH + self.HEAD * self.many)

    def check_base(self):
        """That threads and descriptors come back to what they were."""
        until(lambda: self.usage()[0] <= self.base[0] + self.SLACK)
        until(lambda: self.usage()[1] <= self.base[1] + self.SLACK)
        self.check_service()
        self.assertEqual(self.server.end(), (0, ""))

    def test_requests_that_arrive_in_small_pieces_forever(self):
        kinds = (
            (GET + b"A: ", b"x"),
            (GET, b"A: b\r\n" * 100),
            (LENGTH + b"200000\r\n\r\n", b"x"),
            (CHUNKED, b"1\r\nx\r\n"),
        )
        pieces = {}
        for begin, piece in kinds:
            self.attack(begin, self.many // len(kinds))
            pieces.update(dict.fromkeys(self.connections[len(pieces) :], piece))
        self.await_threads(len(pieces))
        deadline = time.monotonic() + PATIENCE
        while pieces:
            self.assertLess(time.monotonic(), deadline)
            self.check_service()
            for connection, piece in list(pieces.items()):
                with contextlib.suppress(BlockingIOError):
                    connection.send(piece)
                    self.assertRegex(connection.recv(1000), rb"^HTTP/1\.1 4(08|31|13) ")
                    del pieces[connection]
        self.disconnect()
        self.check_base()

    def test_a_terabyte_is_refused_before_any_of_it_arrives(self):
        self.attack(LENGTH + b"1000000000000\r\n\r\n")
        for connection in self.connections:
            connection.setblocking(True)
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 413 "))
        self.check_service()
        self.disconnect()
        self.check_base()

    def test_connections_that_are_silent_after_a_request(self):
        self.attack(CALL)
        self.await_threads(self.many)
        self.check_service()
        self.disconnect()
        self.check_base()

    def test_consumers_that_are_cut_off_while_they_wait(self):
        for reset in (True, False):
            self.attack(b"GET /channels/q" + HOST + b"\r\n", self.many // 2)
            until(lambda: self.waiting() >= self.many // 2)
            self.check_service()
            self.disconnect(reset)
            self.assertEqual(self.server.call("POST", "/channels/q", b"kept")[0], 202)
            message = self.server.call("GET", "/channels/q?auto")
            self.assertEqual((message[2], message[1]["x-linger-delivered"]), (b"kept", "1"))
        self.check_base()

    def waiting(self):
        return json.loads(self.server.call("GET", "/channels/q/info")[2])["waiting"]

    def test_readers_that_never_read(self):
        id = json.loads(self.server.call("POST", "/channels/q", b"x" * 250_000)[2])["id"]
        self.attack(f"GET /messages/{id} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 20, self.many // 4)
        self.await_threads(self.many // 4)
        self.check_service()
        self.disconnect(reset=True)
        self.check_base()

    def test_clients_that_connect_and_leave(self):
        for _ in range(5):
            self.attack(b"")
            self.check_service()
            self.disconnect(reset=True)
        self.check_base()


class CrashTest(ProcessCase):
    """kill -9 at any moment: what was answered stays, in order, and what was deleted is gone."""

    rounds = 5

    def produce(self, server, name, posted):
        """Posts until the server is gone; `posted` gets the ids by body, None for unanswered."""
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        with contextlib.closing(client), contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                body = f"{name}:{len(posted)}"
                posted[body] = None
                answer = exchange(client, "POST", "/channels/q", body)
                posted[body] = json.loads(answer[2])["id"]

    def consume(self, server, deleted, doubtful):
        """Takes and deletes until the server is gone; returns what it took, in order."""
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        taken = []
        with contextlib.closing(client), contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                _, headers, body = exchange(client, "GET", "/channels/q")
                body, id = body.decode(), int(headers["x-linger-msg-id"])
                taken.append(id)
                doubtful.add(body)
                self.assertEqual(exchange(client, "DELETE", f"/messages/{id}")[0], 204)
                deleted.add(body)
        return taken

    def test_killed_in_a_redrive_or_drain_each_message_is_there_once_or_gone(self):
        server = self.start("--sync=off")
        client = linger.Client(f"http://127.0.0.1:{server.port}")
        for _ in range(10):
            client.post_batch("failed", ["x"] * 1_000)
        self.kill_during(server, "POST", "/channels/failed/redrive?to=q", "failed")
        (left, moved) = self.counts("failed", "q")
        self.assertEqual(left + moved, 10_000)
        self.assertGreater(moved, 0)
        self.kill_during(self.start("--sync=off"), "DELETE", "/channels/q", "q")
        self.assertLess(self.counts("q")[0], moved)

    def kill_during(self, server, method, path, channel):
        """Kills a server as soon as it has begun to take messages from a channel."""
        counts = f"/channels/{channel}/stats"
        before = server.call("GET", counts)[2]
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(server.call, method, path)
            until(lambda: server.call("GET", counts)[2] != before)
            server.end(signal.SIGKILL)
            self.assertIsNotNone(ended.exception() or ended.result())

    def counts(self, *channels):
        """How many rows channels have, which are also counted for them."""
        self.start("--sync=off").end()
        with contextlib.closing(sqlite3.connect(self.dbfile)) as connection:
            self.assertEqual(connection.execute("pragma quick_check").fetchone(), ("ok",))
            rows = "select count(*) from messages where channel = ?"
            kept = "select coalesce(sum(ready), 0) from channels where name = ?"
            counts = [connection.execute(rows, (c,)).fetchone()[0] for c in channels]
            self.assertEqual(
                [connection.execute(kept, (c,)).fetchone()[0] for c in channels], counts
            )
        return counts

    def test_no_acknowledged_message_is_lost_and_no_deleted_one_comes_back(self):
        posted = [{} for _ in range(4)]
        deleted, doubtful = set(), set()
        for number in range(self.rounds):
            server = self.start("--max-connections=50")
            with ThreadPoolExecutor(6) as pool:
                for n in range(4):
                    pool.submit(self.produce, server, str(n), posted[n])
                takes = [pool.submit(self.consume, server, deleted, doubtful) for _ in range(2)]
                until(lambda n=number: len(deleted) >= (n + 1) * 60)
                server.end(signal.SIGKILL)
            for taken in takes:
                self.assertEqual(taken.result(), sorted(taken.result()))
        self.start().end()
        with contextlib.closing(sqlite3.connect(self.dbfile)) as connection:
            rows = connection.execute("select id, body from messages order by id").fetchall()
        left = {body.decode(): id for id, body in rows}
        self.assertEqual(len(left), len(rows))
        self.assertEqual(deleted & set(left), set())
        ids = []
        for sent in posted:
            acknowledged = {body: id for body, id in sent.items() if id is not None}
            self.assertEqual(set(acknowledged) - doubtful - set(left), set())
            self.assertEqual(sorted(acknowledged.values()), list(acknowledged.values()))
            for body, id in acknowledged.items():
                self.assertEqual(left.get(body, id), id)
            ids += acknowledged.values()
        self.assertEqual(len(ids), len(set(ids)))

    def test_a_server_killed_while_it_starts_always_starts_again(self):
        for milliseconds in range(0, 120, 15):
            process = subprocess.Popen(
                [sys.executable, "-S", compiled, "--port=0", f"--dbfile={self.dbfile}"],
                stdout=subprocess.DEVNULL,
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(milliseconds / 1000)
            process.kill()
            process.wait()
        server = self.start()
        self.assertEqual(server.call("POST", "/channels/q", "x")[0], 202)


class GroupCrashTest(ProcessCase):
    """kill -9 while many consumers work on groups: their order holds, one message at a time."""

    kills, groups, length, consumers = 2, 4, 20, 8

    def setUp(self):
        super().setUp()
        self.posted = {}  # ids by body, which is (group, number)
        self.deliveries = []  # (moment, when it was asked for, body)
        self.ended = {}  # when a call was made that may have ended it, by body
        self.released = collections.defaultdict(list)  # the same of those that may have released it
        self.is_over = False
        self.chance = random.Random(3)

    @contextlib.contextmanager
    def caller(self, server):
        """A function for calls, until the server is gone."""
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)

        with contextlib.closing(client), contextlib.suppress(OSError, http.client.HTTPException):
            yield functools.partial(exchange, client)

    def produce(self, server, group):
        """Posts what is left of a group, in its order."""
        with self.caller(server) as call:
            for n in range(sum(g == group for g, _ in self.posted), self.length):
                body, parameters = f"{group}:{n}", "timeout=1&deliver=4&dead=failed"
                path = f"/channels/q?group={group}&dedup={body}&{parameters}"
                self.posted[group, n] = json.loads(call("POST", path, body)[2])["id"]

    def consume(self, server):
        """Takes, and ends most of what it has, until the server is gone or all is done."""
        with self.caller(server) as call:
            while not self.is_over:
                asked_at = time.monotonic()
                status, fields, answer = call("GET", "/channels/q?wait=1")
                if status == 200:
                    body = tuple(map(int, answer.split(b":")))
                    self.deliveries.append((time.monotonic(), asked_at, body))
                    self.go_on(call, body, fields)

    def go_on(self, call, body, fields):
        path, lease = f"/messages/{fields['x-linger-msg-id']}", f"lease={fields['x-linger-lease']}"
        fate, now = self.chance.random(), time.monotonic()
        if fields["x-linger-delivered"] == fields["x-linger-deliver"]:
            self.ended.setdefault(body, now)
        if fate < 0.01:
            return  # its timeout passes
        if fate < 0.3:
            self.released[body].append(now)
            call("POST", f"{path}/release?delay={int(fate < 0.02)}&{lease}")
            return
        later = body[0], body[1] + self.chance.randint(2, 9)
        if fate < 0.4 and later in self.posted:  # it is blocked
            self.ended.setdefault(later, now)
            call("DELETE", f"/messages/{self.posted[later]}")
        self.ended.setdefault(body, now)
        if fate < 0.5:
            call("POST", f"{path}/reject?{lease}")
        else:
            call("DELETE", f"{path}?{lease}")

    def test_each_group_stays_in_order_one_at_a_time(self):
        for number in range(self.kills + 1):
            server = self.start("--max-connections=50")
            with ThreadPoolExecutor(self.groups + self.consumers) as pool:
                for group in range(self.groups):
                    pool.submit(self.produce, server, group)
                for _ in range(self.consumers):
                    pool.submit(self.consume, server)
                share = self.groups * self.length * (number + 1) // (self.kills + 1)
                try:
                    until(lambda n=share: len(self.ended) >= n)
                    if number == self.kills:
                        drained = "/channels/q/drained?wait=20"
                        self.assertEqual(server.call("GET", drained)[0], 204)
                        self.is_over = True
                finally:  # its consumers end with it
                    server.end(signal.SIGKILL)
            self.check_rows()
        self.check_deliveries()

    def check_rows(self):
        """What must be so in the database after each kill."""
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(self.folder, copy, dirs_exist_ok=True)
            with contextlib.closing(sqlite3.connect(Path(copy, "linger.db"))) as connection:
                groups = connection.execute(
                    "select group_key, sum(state = 1), count(*) - sum(blocked) from messages"
                    " where dead_from = '' group by group_key"
                ).fetchall()
                counted, kept = (connection.execute(sql).fetchall() for sql in COUNTS)
                rows = connection.execute("select cast(body as text), dead_from from messages")
                left = {tuple(map(int, body.split(":"))): dead for body, dead in rows}
        self.assertEqual([group for group in groups if group[1] > 1 or group[2] != 1], [])
        self.assertEqual(counted, kept)
        self.assertEqual(self.posted.keys() - self.ended.keys() - left.keys(), set(), "lost")
        self.ended.update((body, 0) for body in left if left[body] and body not in self.ended)

    def check_deliveries(self):
        latest = dict.fromkeys(range(self.groups), (0, 0, -1))
        for moment, asked_at, (group, n) in sorted(self.deliveries):
            before, asked_before, last = latest[group]
            self.assertGreaterEqual(n, last, "a group went back")
            if n == last and moment - asked_before < 1:  # its timeout
                released = any(before <= at <= moment for at in self.released[group, n])
                self.assertTrue(released, "two have one message")
            for passed in range(max(last, 0), n):
                self.assertLess(self.ended[group, passed], moment, "two of a group at a time")
            latest[group] = moment, asked_at, n


class ReplayCrashTest(ProcessCase):
    """kill -9 while topics are published on: a reader that connects again and again, of one topic
    or of a pattern, sees each publication once and in order."""

    kills, length, most = 2, 120, 8  # the most events that a connection reads

    def setUp(self):
        super().setUp()
        self.published = 0
        self.topics = random.Random(4).choices(["a.b", "a.c", "a", "b"], k=self.length)

    def publish(self):
        """Publishes a number on each of the topics, again and again until it is acknowledged."""
        broken = contextlib.suppress(OSError, http.client.HTTPException)
        while self.published < self.length:
            with broken, self.server.session() as call:
                while self.published < self.length:
                    path = f"/topics/{self.topics[self.published]}?dedup={self.published}"
                    if call("POST", path, str(self.published))[0] == 202:
                        self.published += 1

    def read(self, path, last_number, chance):
        """The numbers that a reader sees until the last one; the ids must grow."""
        broken = contextlib.suppress(OSError, http.client.HTTPException)
        seen, id = [-1], 0
        while seen[-1] != last_number:
            client = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE)
            headers = {"Accept": "application/x-ndjson", "Last-Event-ID": str(id)}
            with contextlib.closing(client), broken:
                client.request("GET", path, headers=headers)
                lines = filter(bytes.strip, client.getresponse())
                for line in itertools.islice(lines, chance.randint(1, self.most)):
                    event = json.loads(line)
                    self.assertGreater(event["id"], id)
                    id = event["id"]
                    seen.append(int(event["body"]))
                    if seen[-1] == last_number:
                        break
        return seen[1:]

    def test_each_publication_is_seen_once(self):
        arguments = ("--sync=off", "--max-connections=50")
        self.server = self.start(*arguments)
        for topic in set(self.topics):
            self.server.call("PUT", f"/topics/{topic}/settings?keep=10000")
        numbers = [n for n, topic in enumerate(self.topics) if topic == "a.b"]
        matching = [n for n, topic in enumerate(self.topics) if topic != "b"]
        with ThreadPoolExecutor(3) as pool:
            publisher = pool.submit(self.publish)
            one = pool.submit(self.read, "/topics/a.b/live", numbers[-1], random.Random(5))
            all = pool.submit(self.read, "/patterns/a.%23/live", matching[-1], random.Random(6))
            for n in range(self.kills):
                until(lambda n=n: self.published >= self.length * (n + 1) // (self.kills + 1))
                self.server.end(signal.SIGKILL)
                self.server = self.start(*arguments)
            publisher.result()
            self.assertEqual(one.result(), numbers)
            self.assertEqual(all.result(), matching)


DONE = (200, 202, 204)
UNKNOWN = (0, 504)  # 0: the connection broke
EXPECTED = (*DONE, *UNKNOWN, 404, 409, 503)
LEASE_SLACK = 0.1  # seconds by which a lease may end early: servers agree on time by short messages
SERVES_WITHIN = 10.0  # seconds after a fault


class Call(NamedTuple):
    """A request of a producer or consumer, and how it ended.  Times are of one clock."""

    kind: str  # post, take or delete; a take that got no message is none
    body: str
    begun: float
    ended: float
    status: int
    id: int = 0
    lease: int = 0
    timeout: int = 0  # how long the lease of a take is
    group: str = ""  # of a take


def find_faults(calls, disturbances=()):
    """What is wrong in the history of a channel that was drained, a sentence for each fault.

    `disturbances` are pairs of a moment and of what was done to the cluster then.
    """
    by_body = {}
    for call in calls:
        kinds = by_body.setdefault(call.body, {"post": [], "take": [], "delete": []})
        kinds[call.kind].append(call)
    faults = [f"{c.body}: a {c.kind} got {c.status}" for c in calls if c.status not in EXPECTED]
    for body, kinds in by_body.items():
        posts, takes, deletes = kinds.values()
        faults += [f"{body}: {fault}" for fault in faults_of_posts(posts, takes)]
        faults += [f"{body}: {fault}" for fault in faults_of_deletes(posts, takes, deletes)]
        faults += [f"{body}: {fault}" for fault in faults_of_leases(takes)]
    faults += faults_of_groups(calls)
    served = sorted((c.begun, c.ended) for c in calls if c.kind == "post" and c.status == 202)
    for moment, what in disturbances:
        end = moment + SERVES_WITHIN
        later = served[bisect.bisect_left(served, (moment, 0)) : bisect.bisect(served, (end, 0))]
        if not any(ended <= end for _, ended in later):
            faults.append(f"no post succeeded within {SERVES_WITHIN:.0f} s of: {what}")
    return faults


def faults_of_posts(posts, takes):
    """A message is there once if a post succeeded, once or not at all if one is in doubt."""
    if not any(post.status in (*DONE, *UNKNOWN) for post in posts) and takes:
        yield "delivered, although each post of it failed"
    if len({call.id for call in (*posts, *takes) if call.id}) > 1:
        yield "added twice"


def faults_of_deletes(posts, takes, deletes):
    """A message that was added is deleted once, and then it is gone."""
    done = [delete for delete in deletes if delete.status in DONE]
    last = max((take.lease for take in takes), default=0)
    doubtful = any(d.status in UNKNOWN and d.lease >= last for d in deletes)
    if len(done) > 1:
        yield "deleted twice"
    if any(post.status in DONE for post in posts) and not takes:
        yield "lost before its first delivery"
    elif takes and not done and not doubtful:
        yield "lost after its delivery: nobody deleted it"
    gone = min((d.ended for d in deletes if d.status in (*DONE, 404)), default=math.inf)
    lease = min((delete.lease for delete in done), default=math.inf)
    if any(take.begun > gone or take.lease > lease for take in takes):
        yield "delivered after its deletion"


def faults_of_leases(takes):
    """A lease is nobody else's until its time is over, counted from before it was asked for."""
    held_until = held = 0
    for take in sorted(takes, key=lambda take: take.lease):
        if take.lease == held:
            yield f"lease {held} given to two"
        elif take.ended < held_until - LEASE_SLACK:
            yield f"leases {held} and {take.lease} at the same time"
        held, held_until = take.lease, max(held_until, take.begun + take.timeout)


def faults_of_groups(calls):
    """A message of a group is taken after the deletion of the one before it."""
    deletes, firsts = {}, {}
    for call in calls:
        if call.kind == "delete" and call.status in (*DONE, *UNKNOWN):
            deletes[call.id] = min(deletes.get(call.id, math.inf), call.begun)
        elif call.kind == "take" and call.group:
            taken = firsts.setdefault(call.group, {})
            taken[call.id] = min(taken.get(call.id, math.inf), call.ended)
    for group, taken in firsts.items():
        for before, after in zip(sorted(taken), sorted(taken)[1:]):
            if taken[after] < deletes.get(before, math.inf):
                yield f"group {group}: {after} taken while {before} was there"


class FindFaultsTest(unittest.TestCase):
    """The checker of histories finds each fault in one that has it."""

    POST = Call("post", "x", 0, 1, 202, id=1)
    TAKE = Call("take", "x", 2, 3, 200, id=1, lease=1, timeout=10)
    DELETE = Call("delete", "x", 4, 5, 204, id=1, lease=1)
    TAKE_AGAIN = TAKE._replace(begun=14, ended=15, lease=2)
    DELETE_AGAIN = DELETE._replace(begun=16, ended=17, lease=2)

    def check(self, *calls, fault=None):
        self.assertEqual(find_faults(calls), [f"x: {fault}"] if fault else [])

    def test_a_history_without_a_fault(self):
        self.check(self.POST, self.TAKE, self.DELETE)
        self.check(self.POST, self.TAKE, self.TAKE_AGAIN, self.DELETE_AGAIN)
        late = self.DELETE_AGAIN._replace(status=409, lease=1)
        self.check(self.POST, self.TAKE, self.TAKE_AGAIN, late, self.DELETE_AGAIN)
        soon = self.TAKE_AGAIN._replace(begun=11, ended=12.5)
        self.check(self.POST, self.TAKE, soon, self.DELETE_AGAIN)

    def test_a_post_in_doubt_was_done_or_not(self):
        for status in UNKNOWN:
            doubtful = self.POST._replace(status=status, id=0)
            self.check(doubtful)
            self.check(doubtful, self.TAKE, self.DELETE)
            self.check(doubtful, self.POST, self.TAKE, self.DELETE)

    def test_a_deletion_in_doubt_was_done_or_not(self):
        for status in UNKNOWN:
            doubtful = self.DELETE._replace(status=status)
            self.check(self.POST, self.TAKE, doubtful)
            self.check(self.POST, self.TAKE, doubtful, self.DELETE)
            self.check(self.POST, self.TAKE, doubtful, self.DELETE._replace(status=404))
            self.check(self.POST, self.TAKE, doubtful, self.TAKE_AGAIN, self.DELETE_AGAIN)

    def test_a_lost_message(self):
        self.check(self.POST, fault="lost before its first delivery")
        fault = "lost after its delivery: nobody deleted it"
        self.check(self.POST, self.TAKE, fault=fault)
        for status in (404, 409, 503):
            failed = self.DELETE._replace(status=status)
            self.check(self.POST, self.TAKE, failed, fault=fault)
        doubtful = self.DELETE._replace(status=504)
        self.check(self.POST, self.TAKE, doubtful, self.TAKE_AGAIN, fault=fault)

    def test_a_message_added_twice(self):
        again = self.POST._replace(id=2)
        self.check(self.POST, again, self.TAKE, self.DELETE, fault="added twice")
        doubtful = self.POST._replace(status=504, id=0)
        again, delete = self.TAKE_AGAIN._replace(id=2), self.DELETE_AGAIN._replace(id=2)
        self.check(doubtful, self.TAKE, again, delete, fault="added twice")

    def test_a_message_whose_post_failed(self):
        refused = self.POST._replace(status=503, id=0)
        self.check(refused)
        fault = "delivered, although each post of it failed"
        self.check(refused, self.TAKE, self.DELETE, fault=fault)

    def test_a_status_that_says_nothing(self):
        self.check(self.POST._replace(status=500, id=0), fault="a post got 500")

    def test_a_message_deleted_twice(self):
        self.check(self.POST, self.TAKE, self.DELETE, self.DELETE, fault="deleted twice")

    def test_a_message_that_comes_back_after_its_deletion(self):
        fault = "delivered after its deletion"
        self.check(self.POST, self.TAKE, self.DELETE, self.TAKE_AGAIN, fault=fault)
        doubtful = self.DELETE._replace(status=504)
        gone = self.DELETE._replace(status=404)
        history = self.POST, self.TAKE, doubtful, gone, self.TAKE_AGAIN, self.DELETE_AGAIN
        self.check(*history, fault=fault)

    def test_a_deletion_with_a_lease_that_was_lost(self):
        late = self.DELETE_AGAIN._replace(lease=1)
        history = self.POST, self.TAKE, self.TAKE_AGAIN, late
        self.check(*history, fault="delivered after its deletion")

    def test_a_message_held_by_two(self):
        early = self.TAKE_AGAIN._replace(begun=10, ended=11.8)
        history = self.POST, self.TAKE, early, self.DELETE_AGAIN
        self.check(*history, fault="leases 1 and 2 at the same time")
        same = self.TAKE_AGAIN._replace(lease=1)
        self.check(self.POST, self.TAKE, same, self.DELETE_AGAIN, fault="lease 1 given to two")

    def test_a_group_out_of_order(self):
        for begun, faults in ((9, []), (3.4, ["group g: 2 taken while 1 was there"])):
            calls = [self.POST, self.TAKE._replace(group="g"), self.DELETE]
            take = self.TAKE._replace(begun=begun, ended=begun + 0.5, group="g")
            others = self.POST, take, self.DELETE_AGAIN
            calls += [call._replace(body="y", id=2, lease=1) for call in others]
            self.assertEqual(find_faults(calls), faults)

    def test_a_cluster_that_does_not_serve_after_a_fault(self):
        history = self.POST, self.TAKE, self.DELETE
        moves = [c._replace(body="y", begun=c.begun + 20, ended=c.ended + 20) for c in history]
        moments = [(-1, "one"), (0.5, "two"), (11.5, "three"), (21, "four")]
        expected = [f"no post succeeded within 10 s of: {what}" for what in ("two", "four")]
        self.assertEqual(find_faults([*history, *moves], moments), expected)


def free_ports(count):
    """Ports below those that the system gives to connections, so that they stay free when the
    process that listens there is killed and started again."""
    with contextlib.ExitStack() as stack:
        ports = []
        while len(ports) < count:
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", random.randrange(15_000, 30_000)))
                ports.append(listener.getsockname()[1])
        return ports


class RqliteNode:
    """A node of an rqlite cluster: a process with ports and a folder of its own."""

    def __init__(self, folder, number, http_port, raft_port, raft_ports):
        self.port = http_port
        self.log = folder / f"node{number}.log"
        self.command = [
            RQLITED, f"-node-id={number}", f"-http-addr=127.0.0.1:{http_port}",
            f"-raft-addr=127.0.0.1:{raft_port}", f"-bootstrap-expect={len(raft_ports)}",
            "-join=" + ",".join(f"127.0.0.1:{port}" for port in raft_ports),
            str(folder / f"node{number}"),
        ]  # fmt: skip
        self.start()

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def get(self, path):
        """The status and body of a GET; 0 if there was none."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
        with contextlib.closing(client):
            try:
                status, _, body = exchange(client, "GET", path)
                return status, body
            except (OSError, http.client.HTTPException):
                return 0, b""

    def count_messages(self):
        count = "select count(*) from messages where channel = 'q'"
        query = urllib.parse.urlencode({"level": "none", "q": count})
        return json.loads(self.get(f"/db/query?{query}")[1])["results"][0]["values"][0][0]

    def is_ready(self):
        return self.get("/readyz")[0] == 200

    def is_leader(self):
        status, body = self.get("/status")
        raft = json.loads(body)["store"].get("raft", {}) if status == 200 else {}
        return raft.get("state") == "Leader"


@unittest.skipUnless(RQLITED, "LINGER_TEST_RQLITED names no rqlited; see make test-cluster")
class NodesCase(Folder):
    """A test with rqlite nodes."""

    def start_nodes(self, count=3):
        """The nodes of a new cluster, which has a leader."""
        ports = free_ports(2 * count)
        raft_ports = ports[count:]
        nodes = [
            RqliteNode(self.folder, n, ports[n], raft_ports[n], raft_ports) for n in range(count)
        ]
        for node in nodes:
            self.addCleanup(node.kill)
        until(lambda: all(node.is_ready() for node in nodes), 3 * PATIENCE)
        return nodes


class ClusterProcessTest(ProcessCase):
    def test_it_says_which_cluster_it_uses_without_the_password(self):
        cluster = Rqlite()
        self.addCleanup(cluster.close)
        server = Process("--port", "0", "--dbfile", cluster.url.replace("//", "//me:secret@"))
        self.addCleanup(server.end, signal.SIGKILL)
        url = cluster.url.replace("//", "//me@")
        self.assertEqual(server.line.partition(", ")[2], f"messages kept in {url}\n")


class Link:
    """A proxy on the way to a node.  While it is cut it takes bytes, both ways, and passes none on;
    when it is whole again, it passes on what it held, or closes what it dropped bytes of."""

    def __init__(self, port):
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.whole = threading.Event()
        self.whole.set()
        self.drops = False
        threading.Thread(target=self.accept, daemon=True).start()

    def cut(self, drops):
        self.drops = drops
        self.whole.clear()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                threading.Thread(target=self.connect, args=(near,), daemon=True).start()

    def connect(self, near):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            stack.enter_context(near)
            far = stack.enter_context(socket.create_connection(("127.0.0.1", self.target)))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=self.pump, args=(far, near), daemon=True)
            back.start()
            self.pump(near, far)
            back.join()

    def pump(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if not self.whole.is_set():
                    drops = self.drops
                    self.whole.wait()
                    if drops:
                        break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.drops = True
        self.whole.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def pause(seconds):
    select.select([], [], [], seconds)


class Party:
    """A producer or consumer: its connection to one of the servers, and its calls so far."""

    def __init__(self, ports, seed):
        self.random = random.Random(seed)
        self.ports = ports
        self.calls = []
        self.served = 0.0  # when the last post began that succeeded
        self.client = None

    def send(self, method, path, body=None, headers=None):
        """Status and body of the response: 0 if the connection broke, 503 if there was
        none; each of them and a 504 leads to another server."""
        try:
            if self.client is None or self.random.random() < 0.02:
                self.close()
                port = self.random.choice(self.ports)
                timeout = self.random.choice((2, 2, 2 * PATIENCE))
                self.client = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
                self.client.connect()
        except OSError:
            self.close()
            return 503, b""
        try:
            status, _, body = exchange(self.client, method, path, body, headers)
        except (OSError, http.client.HTTPException):
            status, body = 0, b""
        if status in (0, 503, 504):
            self.close()
        return status, body

    def close(self):
        if self.client is not None:
            self.client.close()
            self.client = None

    def record(self, kind, body, begun, status, **fields):
        self.calls.append(Call(kind, body, begun, time.monotonic(), status, **fields))

    def post(self, body, key, group):
        begun = time.monotonic()
        headers = {"Idempotency-Key": key} if key else {}
        path = f"/channels/q?group={group}" if group else "/channels/q"
        status, content = self.send("POST", path, body, headers)
        id = json.loads(content)["id"] if status == 202 else 0
        self.record("post", body, begun, status, id=id)
        if id:
            self.served = begun
        return bool(id)

    def take(self, ack=None):
        """Takes up to some messages, and deletes another in the same transaction."""
        begun = time.monotonic()
        timeout, n = self.random.randint(2, 6), self.random.choice((1, 1, 4))
        path = f"/channels/q?wait=1&timeout={timeout}&n={n}"
        if ack:
            path += f"&ack={ack['id']}&lease={ack['lease']}"
        status, content = self.send("GET", path)
        if ack:
            self.record("delete", ack["body"], begun, status, id=ack["id"], lease=ack["lease"])
        messages = json.loads(content) if status == 200 else []
        for each in messages:
            self.record("take", each["body"], begun, status, id=each["id"], lease=each["lease"],
                        timeout=timeout, group=each.get("group", ""))  # fmt: skip
        return messages, status

    def delete(self, message):
        """Deletes a message; asks until it is known whether that was done."""
        while True:
            begun = time.monotonic()
            path = f"/messages/{message['id']}?lease={message['lease']}"
            status, _ = self.send("DELETE", path)
            self.record("delete", message["body"], begun, status, id=message["id"],
                        lease=message["lease"])  # fmt: skip
            if status not in (0, 503, 504):
                return
            pause(0.02)


class ChaosOnClusterTest(NodesCase):
    """Two servers on three nodes, which are killed, stopped and cut off while clients use them.

    LINGER_TEST_SECONDS says for how long, LINGER_TEST_SEED what is done when.
    """

    def setUp(self):
        super().setUp()
        self.seconds = float(os.environ.get("LINGER_TEST_SECONDS", "20"))
        self.seed = int(os.environ.get("LINGER_TEST_SEED", "1"))
        self.nodes = self.start_nodes()
        self.links = [[Link(node.port) for node in self.nodes] for _ in range(2)]
        for link in itertools.chain(*self.links):
            self.addCleanup(link.close)
        self.ports = free_ports(2)
        self.servers = [self.start_server(number) for number in range(2)]
        self.assertNotIn(None, [server.port for server in self.servers])
        self.disturbances = []
        self.parties = []
        self.posting, self.taking = threading.Event(), threading.Event()
        self.posting.set()
        self.taking.set()

    def start_server(self, number):
        hosts = ",".join(f"127.0.0.1:{link.port}" for link in self.links[number])
        options = "--port", str(self.ports[number]), "--dbfile", f"http://{hosts}"
        with (self.folder / f"server{number}.log").open("a") as log:
            server = Process(*options, strict=False, errors=log)
        self.addCleanup(server.end, signal.SIGKILL)
        return server

    # -- faults

    def note(self, what):
        self.disturbances.append((time.monotonic(), what))

    def leader(self):
        until(lambda: any(node.is_leader() for node in self.nodes))
        return next((node for node in self.nodes if node.is_leader()), self.nodes[0])

    def kill_node(self, node, chance):
        node.kill()
        pause(chance.uniform(0, 3))
        node.start()
        until(node.is_ready, 3 * PATIENCE)

    def kill_leader(self, chance):
        node = self.leader()
        self.note(f"kill -9 of the leader, node {self.nodes.index(node)}")
        self.kill_node(node, chance)

    def kill_follower(self, chance):
        leader = self.leader()
        node = chance.choice([node for node in self.nodes if node is not leader])
        self.note(f"kill -9 of a follower, node {self.nodes.index(node)}")
        self.kill_node(node, chance)

    def stop_leader(self, chance):
        node = self.leader()
        self.note(f"SIGSTOP of the leader, node {self.nodes.index(node)}")
        node.process.send_signal(signal.SIGSTOP)
        pause(chance.uniform(2, 5))
        node.process.send_signal(signal.SIGCONT)
        until(node.is_ready, 3 * PATIENCE)

    def kill_server(self, chance):
        number = chance.randrange(2)
        self.note(f"kill -9 of server {number}")
        self.servers[number].end(signal.SIGKILL)
        pause(chance.uniform(0, 2))
        self.servers[number] = self.start_server(number)
        while self.servers[number].port is None:  # it gives up after a while without a leader
            self.servers[number].end()
            self.servers[number] = self.start_server(number)

    def cut_server(self, chance):
        number, drops = chance.randrange(2), chance.random() < 0.5
        links = self.links[number]
        if chance.random() < 0.7:
            links = [links[self.nodes.index(self.leader())]]
        self.note(f"server {number} cut from {len(links)} nodes, {drops=}")
        for link in links:
            link.cut(drops)
        pause(chance.uniform(1, 5))
        for link in links:
            link.whole.set()

    def disturb(self, seed, *faults):
        """Does one thing after another to the cluster, each equally often, when it serves again."""
        chance = random.Random(seed)
        end = time.monotonic() + self.seconds
        while True:
            for fault in chance.sample(faults, len(faults)):
                if time.monotonic() > end:
                    return
                pause(chance.uniform(0, 1.5))
                begun = time.monotonic()
                fault(chance)
                with contextlib.suppress(AssertionError):  # which the checker sees
                    until(lambda begun=begun: self.served() > begun, SERVES_WITHIN)

    # -- clients

    def party(self, number):
        party = Party(self.ports, number)
        self.parties.append(party)
        self.addCleanup(party.close)
        return party

    def served(self):
        return max(party.served for party in self.parties)

    def produce(self, number):
        """Posts; repeats what has a key until it succeeds."""
        party = self.party(number)
        numbers = itertools.count()
        while self.posting.is_set():
            n = next(numbers)
            body = f"{number}:{n}"
            key = body if n % 4 else ""
            group = f"{number}:{n % 5}" if number < 2 else ""
            while not party.post(body, key, group):
                pause(0.02)
                if not key:
                    break
            pause(0.005)
        return party

    def consume(self, number):
        """Takes and deletes; forgets some messages, which come back."""
        party = self.party(number)
        ack = None
        while ack or self.taking.is_set():
            messages, status = party.take(ack)
            if status not in DONE:
                pause(0.02)
            if ack and status not in (*DONE, 404, 409):
                party.delete(ack)
            ack = None
            kept = [each for each in messages if party.random.random() > 0.03]
            for message in kept:
                if ack is None and party.random.random() < 0.3:
                    ack = message
                else:
                    party.delete(message)
        return party

    def is_drained(self):
        status, body = self.party(0).send("GET", "/channels/q/stats")
        return status == 200 and json.loads(body) == {"ready": 0, "hidden": 0}

    def test_the_books_are_right_whatever_happens(self):
        self.party(0).send("PUT", "/schedules/tick?channel=ticks&every=1", "tick")
        begun = time.monotonic()
        with ThreadPoolExecutor(20) as pool:
            clients = [pool.submit(self.produce, n) for n in range(8)]
            clients += [pool.submit(self.consume, n) for n in range(8, 16)]
            try:
                node_faults = self.kill_leader, self.stop_leader, self.kill_follower
                todo = [
                    pool.submit(self.disturb, self.seed, *node_faults),
                    pool.submit(self.disturb, -self.seed, self.kill_server, self.cut_server),
                ]
                for each in todo:
                    each.result()
                self.posting.clear()
                with contextlib.suppress(AssertionError):  # the faults say what is left
                    until(self.is_drained, 3 * PATIENCE)
            finally:
                self.posting.clear()
                self.taking.clear()
            calls = [call for client in clients for call in client.result().calls]
        self.report(calls)
        faults = find_faults(calls, self.disturbances)
        bodies = {fault.partition(": ")[0] for fault in faults[:5]}
        history = "\n".join(str(call) for call in calls if call.body in bodies)
        self.assertEqual(faults, [], f"{history}\n{self.disturbances}")
        self.assertTrue(self.is_drained())
        ticks = json.loads(self.party(0).send("GET", "/channels/ticks/stats")[1])["ready"]
        self.assertTrue(0 < ticks <= time.monotonic() - begun + 1, ticks)
        for node in self.nodes:
            until(lambda node=node: node.count_messages() == 0)

    def report(self, calls):
        """Prints counts and the longest time in which no post succeeded."""
        ends = sorted(call.ended for call in calls if call.kind == "post" and call.status == 202)
        gap = max((later - sooner for sooner, later in zip(ends, ends[1:])), default=0)
        slowest = max(call.ended - call.begun for call in calls)
        print(f"\nseed {self.seed}, {len(self.disturbances)} faults;", end=" ")
        counts = collections.Counter((call.kind, call.status) for call in calls)
        print(*(f"{kind} {status}: {n}" for (kind, status), n in sorted(counts.items())), sep=", ")
        print(f"longest gap {gap:.1f} s, slowest call {slowest:.1f} s", flush=True)


class WorkerProcessTest(ProcessCase):
    """Real workers against real servers."""

    WORKER = """
import linger, signal, sys, threading

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored below nohup

def do(message):
    print(message.text, message.delivered, flush=True)
    sys.stdin.readline()

def report_stop():
    stop.wait()
    print("stopping", flush=True)

stop = threading.Event()
threading.Thread(target=report_stop).start()
linger.Client(sys.argv[1]).work("q", do, stop=stop)
print("end", flush=True)
"""

    def start_worker(self, server):
        worker = subprocess.Popen(
            [sys.executable, *STRICT, "-c", self.WORKER, server.url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=os.path.dirname(compiled),
        )  # fmt: skip
        self.addCleanup(worker.communicate)
        self.addCleanup(worker.kill)
        return worker

    def test_message_of_a_killed_worker_is_delivered_again(self):
        with linger.serve() as server, linger.Client(server.url) as client:
            client.post("q", "x", timeout=30)
            worker = self.start_worker(server)
            self.assertEqual(worker.stdout.readline(), "x 1\n")
            worker.kill()
            worker.wait()
            pass_time(server.broker, 30)
            message = client.get("q", 5)
            self.assertEqual((message.text, message.delivered), ("x", 2))

    def test_sigterm_ends_a_worker_after_its_current_message(self):
        with linger.serve() as server, linger.Client(server.url) as client:
            client.post_batch("q", ["1", "2"])
            worker = self.start_worker(server)
            self.assertEqual(worker.stdout.readline(), "1 1\n")
            worker.send_signal(signal.SIGTERM)
            self.assertEqual(worker.stdout.readline(), "stopping\n")
            worker.stdin.write("\n")
            self.assertEqual(worker.communicate(timeout=PATIENCE)[0], "end\n")
            self.assertEqual(worker.returncode, 0)
            self.assertEqual(client.read_message(2)[1], "ready")
            self.assertRaises(linger.NotFound, client.read_message, 1)

    def test_sighup_ends_a_worker_in_good_order_however_often_it_comes(self):
        with linger.serve() as server, linger.Client(server.url) as client:
            client.post("q", "1")
            worker = self.start_worker(server)
            worker.stdout.readline()
            worker.send_signal(signal.SIGHUP)
            self.assertEqual(worker.stdout.readline(), "stopping\n")
            worker.send_signal(signal.SIGHUP)
            worker.stdin.write("\n")
            self.assertEqual(worker.communicate(timeout=PATIENCE)[0], "end\n")
            self.assertEqual(worker.returncode, 0)
            self.assertRaises(linger.NotFound, client.read_message, 1)

    def test_sighup_that_is_ignored_stays_ignored(self):
        self.addCleanup(signal.signal, signal.SIGHUP, signal.getsignal(signal.SIGHUP))
        for handler, taken in ((signal.SIG_IGN, False), (print, False), (signal.SIG_DFL, True)):
            signal.signal(signal.SIGHUP, handler)
            self.assertEqual(signal.SIGHUP in linger.stop_signals(), taken)

    def test_worker_prints_nothing_unasked(self):
        program = """
import linger, sys

def fail(message):
    raise ValueError

linger.Client(sys.argv[1]).work("q", fail, wait=0)
"""
        with linger.serve() as server:
            server.broker.post("q", b"x")
            output = subprocess.check_output(
                [sys.executable, *STRICT, "-c", program, server.url],
                cwd=os.path.dirname(compiled), stderr=subprocess.STDOUT, timeout=PATIENCE,
            )  # fmt: skip
            self.assertEqual(output, b"")
            self.assertIn("ValueError", server.broker.read_message(1)[0].error)

    def test_second_sigterm_ends_a_worker_at_once(self):
        with linger.serve() as server, linger.Client(server.url) as client:
            client.post("q", "1")
            worker = self.start_worker(server)
            worker.stdout.readline()
            until(lambda: worker.send_signal(signal.SIGTERM) or worker.poll() is not None)
            self.assertEqual(worker.returncode, -signal.SIGTERM)

    def test_loop_survives_server_restarts_and_loses_nothing(self):
        self.hasten(MIN_RETRY_DELAY=0.01)
        server = self.start()
        port = f"--port={server.port}"
        client = linger.Client(f"http://127.0.0.1:{server.port}", timeout=PATIENCE)
        self.addCleanup(client.close)
        stop, done = threading.Event(), []

        def consume():
            for message in client.consume("q", stop=stop):
                done.append(message.text)
                if message.text == "end":
                    stop.set()

        consuming = self.thread(consume)
        for round in range(3):
            items = [f"{round}-{n}" for n in range(20)]
            client.post_batch("q", items, retry=True)
            until(lambda r=round: f"{r}-10" in done)
            server.end((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)[round])
            server = self.start(port)
        client.post("q", "end", retry=True)
        consuming.result(PATIENCE)
        sent = {f"{round}-{n}" for round in range(3) for n in range(20)}
        self.assertEqual(sent - set(done), set(client_bodies(client, "q")))
        repeated = len(done) - len(set(done))  # current messages when the server was killed
        self.assertLessEqual(repeated, 3)


def client_bodies(client, channel):
    """Returns the bodies of a channel's messages, including those in flight."""
    return [message.text for message, _ in client.list_messages(channel, n=1000)]


if RQLITED:  # too slow for each run of the tests
    BatchOnClusterTest = on_cluster(
        BatchTest, ("test_a_take_of_several_that_finds_nothing_writes_nothing",)
    )
    BoundsOnClusterTest = on_cluster(
        BoundsTest,
        (
            "test_a_database_at_its_bound_adds_nothing_but_gives_and_deletes",
            "test_a_database_that_is_larger_than_its_bound_still_gives_and_deletes",
            "test_a_reply_counts_in_the_bound",
            "test_no_transaction_takes_a_database_beyond_its_bound",
            "test_publications_that_are_kept_count_in_the_bound",
        ),
    )
    BulkOnClusterTest = on_cluster(BulkTest)
    ChangeOnClusterTest = on_cluster(ChangeTest)
    ConcurrencyOnClusterTest = on_cluster(
        ConcurrencyTest, ("test_a_usual_take_of_another_channel_runs_the_usual_statements",)
    )
    DeadLetterOnClusterTest = on_cluster(DeadLetterTest)
    DeliveryOnClusterTest = on_cluster(DeliveryTest)
    EventOnClusterTest = on_cluster(EventTest, ("test_what_is_rolled_back_is_not_counted",))
    HolderOnClusterTest = on_cluster(HolderTest)
    LeaseAndReleaseOnClusterTest = on_cluster(LeaseAndReleaseTest)
    LookingOnClusterTest = on_cluster(
        LookingTest, ("test_a_listing_of_few_messages_is_as_fast_beside_many",)
    )
    ModelOnClusterTest = on_cluster(ModelTest, STEPS=300)
    ScheduleOnClusterTest = on_cluster(
        ScheduleTest, ("test_a_database_that_fails_leaves_the_due_time",)
    )
    StatsOnClusterTest = on_cluster(StatsTest)
    TopicOnClusterTest = on_cluster(TopicTest)
    WaitingOnClusterTest = on_cluster(
        WaitingTest,
        (
            "test_a_failed_take_wakes_the_next_consumer",
            "test_a_waiting_consumer_takes_a_message_in_the_transaction_that_adds_it",
        ),
        CROWD=200,
    )
    CallOnClusterTest = on_cluster(CallTest, ("test_an_unhealthy_server_says_503",))
    ClientOnClusterTest = on_cluster(ClientTest)
    ConsumerCallOnClusterTest = on_cluster(ConsumerCallTest)
    LongPollOnClusterTest = on_cluster(
        LongPollTest,
        ("test_a_client_that_reads_too_slowly_is_disconnected_and_the_delivery_undone",),  # 20 MB
    )
    LiveOnClusterTest = on_cluster(LiveTest)
    MarkOnClusterTest = on_cluster(MarkTest)
    TogetherOnClusterTest = on_cluster(TogetherTest)


# -- the command line ----------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    """A stream in memory that claims to be a terminal if `terminal` is true."""

    def __init__(self, data=b"", terminal=False):
        super().__init__(io.BytesIO(data), encoding="utf-8", write_through=True)
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def value(self):
        return self.buffer.getvalue()


def run_command(url, *arguments, stdin=b"", terminal=False, stdout=None):
    """Runs a command in this process; returns its exit status, output and errors."""
    streams = [
        Terminal(stdin, terminal),
        stdout or Terminal(b"", terminal),
        Terminal(b"", terminal),
    ]
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.ExitStack() as stack:
        for name, stream in zip(("stdin", "stdout", "stderr"), streams):
            stack.enter_context(unittest.mock.patch.object(sys, name, stream))
        stack.enter_context(unittest.mock.patch.dict(os.environ, {"LINGER_URL": url}))
        try:
            status = linger.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
    return status, streams[1].value(), streams[2].value().decode(errors="replace")


class CommandCase(ServerTest):
    def run_command(self, *arguments, **options):
        return run_command(self.server.url, *arguments, **options)

    def linger(self, *arguments, **options):
        """Returns the output of a command that succeeds without an error message."""
        status, output, errors = self.run_command(*arguments, **options)
        self.assertEqual((status, errors), (0, ""), arguments)
        return output.decode()

    def nothing(self, *arguments):
        self.assertEqual(self.run_command(*arguments)[:2], (1, b""), arguments)

    def refused(self, *arguments, **options):
        """Returns the error of a command that fails: one line, with exit status 2."""
        status, output, errors = self.run_command(*arguments, **options)
        self.assertEqual((status, output, errors.count("\n")), (2, b"", 1), errors)
        self.assertTrue(errors.startswith("linger: "), errors)
        return errors


class CommandTest(CommandCase):
    """Each command, in this process, with a real server."""

    def test_post_and_get_keep_every_byte(self):
        body = bytes(range(256))
        self.assertEqual(self.linger("post", "q", "--type", "image/x", stdin=body), "1\n")
        self.assertEqual(self.run_command("get", "q", "--ack"), (0, body, ""))
        self.assertEqual(self.linger("post", "q", "--priority", "-3", "--", "--x"), "2\n")
        message = self.broker.get("q")
        self.assertEqual((message.body, message.priority), (b"--x", -3))

    def test_get_deletes_with_ack_and_otherwise_leaves_in_flight(self):
        self.linger("post", "q", "a")
        self.linger("post", "q", "b")
        self.assertEqual(self.linger("get", "q", "--ack"), "a")
        message = json.loads(self.linger("get", "p,q", "--json", "--timeout", "99"))
        self.assertEqual((message["id"], message["lease"], message["timeout"]), (2, 1, 99))
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 1})
        self.assertIn("overtaken", self.refused("delete", 2, "--lease", 7))
        self.linger("delete", 2, "--lease", 1)
        self.nothing("delete", 2)

    def test_several_messages_are_written_one_per_line(self):
        for body in (b"a", b"b", b"c"):
            self.broker.post("q", body)
        self.assertEqual(self.linger("get", "q", "--auto", "--count", 2), "a\nb\n")
        self.assertEqual(self.linger("get", "q", "--ack", "--follow", "--count", 1), "c")
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 0, "hidden": 0})

    def test_get_waits_for_a_message(self):
        def post():
            until(lambda: self.broker.info("q")["waiting"])
            self.broker.post("q", b"x")

        posted = self.thread(post)
        self.assertEqual(self.linger("get", "q", "--ack", "--wait", 9), "x")
        posted.result()

    def test_status_is_1_when_nothing_is_found(self):
        for arguments in (
            ("get", "q"), ("get", "q", "--ack", "--json"), ("peek", "q"), ("show", 1),
            ("touch", 1), ("topics",), ("subscribers", "t"), ("settings", "q"),
            ("settings", "q", "--json"), ("dump",), ("work", "q", "--once", "--", "true"),
        ):  # fmt: skip
            self.nothing(*arguments)
        self.assertEqual(self.run_command("redrive", "q"), (1, b"0\n", ""))

    def test_usage_error_is_one_line_and_status_2(self):
        for arguments, reason in (
            (["psot", "q"], "psot"),
            (["post"], "CHANNEL"),
            (["post", "q", "x", "y"], "y (see linger post --help)"),
            (["post", "q", "x", "--deliver", "-1"], "deliver must be an integer from 0"),
            (["post", "q", "x", "--prio", "1"], "--prio"),
            (["post", "q", "x", "--lines"], "standard input"),
            (["post", "q", ""], "empty"),
            (["get", "q", "--count", "0"], "linger: --count must be an integer from 1 to"),
            (["get", "q", "--ack", "--auto"], "--auto"),
            (["get", "", "--ack"], "channel's name"),
            (["work", "q"], "COMMAND"),
            (["work", "q", "--", "no-such-command"], "no-such-command"),
            (["work", "q", "--", "/"], "no executable command /"),
            (["copy", "/no/such", "x"], "there is no database /no/such"),
            (["stats", "--url", f"{self.server.url}/below"], "no such path"),
            (["bench", "--folder", "/no/such", "--seconds", "0.01"], "No such file"),
            (["drain", "q"], "--yes"),
            (["backup", "/no/such/folder/x"], "No such file"),
            (["stats", "--url", "http://127.0.0.1:1"], "cannot connect"),
            (["stats", "--url", "gopher://x"], "URL"),
        ):
            with self.subTest(arguments):
                self.assertIn(reason, self.refused(*arguments))

    def test_lines_are_posted_and_written(self):
        posted = self.linger("post", "q", "--lines", "--priority", "5", stdin=b"a\n\n\xff\r\nlast")
        self.assertEqual(posted, "3\n")
        self.assertEqual(self.broker.read_message(1)[0].priority, 5)
        self.assertEqual(
            self.run_command("get", "q", "--ack", "--count", 9), (0, b"a\n\xff\r\nlast\n", "")
        )

    def test_lines_of_several_batches_keep_their_order(self):
        self.hasten(MAX_BATCH=100)
        lines = [b"%d" % n for n in range(250)]
        self.assertEqual(self.linger("post", "q", "--lines", stdin=b"\n".join(lines)), "250\n")
        listed = self.broker.list_messages("q", n=9_999)
        self.assertEqual([message.body for message, _ in listed], lines)

    def test_failed_lines_are_reported_and_can_be_posted_again(self):
        self.hasten(MAX_BATCH=100)
        lines = [b"x%d" % n for n in range(102)]
        arguments = ("post", "q", "--lines", "--dedup", "key")
        self.allow_messages_of(10)
        errors = self.refused(*arguments, stdin=b"\n".join([*lines, b"too long for it\n"]))
        self.assertIn("line 103: ", errors)
        self.assertIn("100 messages were posted for certain, up to line 100", errors)
        self.linger(*arguments, stdin=b"\n".join(lines))
        self.assertEqual(self.broker.channel_stats("q")["ready"], 102)

    def test_line_larger_than_a_batch_is_refused(self):
        with unittest.mock.patch.object(linger, "MAX_BATCH_BYTES", 100):
            self.assertIn("line 2 ", self.refused("post", "q", "--lines", stdin=b"\n" + b"x" * 101))

    def test_message_that_cannot_be_written_is_released(self):
        self.broker.post("q", b"x")
        reader, writer = os.pipe()
        os.close(reader)
        broken = io.TextIOWrapper(io.FileIO(writer, "w"))
        self.addCleanup(broken.close)
        broken.value = bytes
        self.assertEqual(self.run_command("get", "q", "--ack", stdout=broken)[0], 141)
        self.assertEqual(self.broker.channel_stats("q"), {"ready": 1, "hidden": 0})

    def test_publications_and_subscriptions(self):
        self.linger("subscribe", "mail", "news", "--linger", 60)
        self.linger("subscribe", "log", "news")
        self.assertEqual(self.linger("topics"), "news\n")
        self.assertEqual(self.linger("topics", "mail", "--json"), '{"topic":"news"}\n')
        self.assertEqual(self.linger("subscribers", "news"), "log\nmail\n")
        self.assertEqual(self.linger("publish", "news", "x", "--dedup", "k"), "log\t1\nmail\t2\n")
        self.assertEqual(self.linger("publish", "news", "x", "--dedup", "k"), "log\t1\nmail\t2\n")
        self.assertEqual(self.broker.read_message(2)[0].linger, 60)
        self.linger("unsubscribe", "log", "news")
        self.assertEqual(self.broker.subscribers("news"), ["mail"])

    def test_delivery_is_touched_released_rejected_and_redriven(self):
        self.linger("post", "q", "x", "--dead", "failed")
        self.broker.get("q")
        self.linger("touch", 1, "--lease", 1, "--timeout", 600)
        self.linger("release", 1, "--delay", 60, "--reason", "out\nof paper")
        listed = self.linger("peek", "q", "--state", "delayed")
        self.assertEqual(listed, "1\tdelayed\t0\t1\t0\tout\\nof paper\tx\n")
        self.linger("reject", 1, "--reason", "no such order")
        self.assertEqual(json.loads(self.linger("show", 1, "--json"))["error"], "no such order")
        self.assertEqual(self.linger("show", 1), "x")
        self.assertEqual(self.linger("redrive", "failed", "--to", "p"), "1\n")
        lease = self.broker.get("p").lease
        self.linger("release", 1, "--lease", lease, "--uncounted")
        self.assertEqual(self.broker.read_message(1)[0].delivered, 0)
        self.assertEqual(json.loads(self.linger("peek", "p", "--json"))["state"], "ready")

    def test_drain_asks_at_a_terminal(self):
        self.broker.post("q", b"x")
        status, _, errors = self.run_command("drain", "q", stdin=b"n\n", terminal=True)
        self.assertEqual(status, 1)
        self.assertIn("Delete all 1 messages of q?", errors)
        self.assertEqual(self.broker.channel_stats("q")["ready"], 1)
        self.run_command("drain", "q", stdin=b"y\n", terminal=True)
        self.assertEqual(self.broker.channel_stats("q")["ready"], 0)
        self.broker.post("q", b"x")
        self.linger("drain", "q", "--yes")
        self.assertEqual(self.broker.channel_stats("q")["ready"], 0)

    def test_settings_and_pause(self):
        self.linger("settings", "q", "--deliver", 5, "--hlm", 9)
        self.assertEqual(self.linger("settings", "q"), "deliver\t5\nhlm\t9\n")
        self.assertEqual(self.linger("settings", "q", "--json"), '{"deliver":5,"hlm":9}\n')
        self.linger("settings", "q", "--clear")
        self.assertEqual(self.broker.settings("q"), {})
        self.broker.post("q", b"x")
        self.linger("pause", "q", "--for", 600)
        self.assertEqual(self.linger("channels"), "q\t1\t0\t0\t0\t0\tyes\t0\n")
        self.linger("resume", "q")
        self.assertFalse(json.loads(self.linger("channels", "--json"))["paused"])

    def test_stats_are_shown_once_or_repeatedly_with_rates(self):
        self.assertIn("msg-add\t0\n", self.linger("stats"))
        self.assertEqual(json.loads(self.linger("stats", "--json"))["msg-add"], 0)

        def sleep(seconds):
            if self.broker.counters["msg-add"] == 2:
                raise SystemExit(130)
            self.broker.post("q", b"x")

        with unittest.mock.patch("time.sleep", sleep):
            status, output, _ = self.run_command("stats", "--watch")
        self.assertEqual(status, 130)
        self.assertRegex(output.decode(), r"(?s)msg-add\t1\t[1-9].*msg-add\t2\t[1-9]")

    def test_dump_can_be_loaded_elsewhere_and_a_backup_is_a_database(self):
        for body in (b"a", b"b"):
            self.broker.post("q", body, priority=7)
        dump = self.linger("dump", "q")
        with linger.serve() as other:
            status, output, _ = run_command(other.url, "load", stdin=dump.encode())
            self.assertEqual((status, output), (0, b"2\n"))
            self.assertEqual(run_command(other.url, "dump")[1].decode(), dump)
        self.assertIn("line 2", self.refused("load", stdin=dump.encode()[:-9]))
        self.linger("backup", self.folder / "copy.db")
        with contextlib.closing(linger.Store(str(self.folder / "copy.db"))) as copy:
            (rows,) = copy.read("select body from messages order by id")
        self.assertEqual(rows, [(b"a",), (b"b",)])

    def test_terminal_gets_tables_with_headings(self):
        self.broker.post("a", b"x")
        self.broker.post("long-name", b"\x1b[2J\xc3\xbc" * 100)
        with unittest.mock.patch.dict(os.environ, {"COLUMNS": "70"}):
            _, table, _ = self.run_command("channels", terminal=True)
            _, bodies, _ = self.run_command("peek", "long-name", terminal=True)
        lines = table.decode().splitlines()
        self.assertRegex(lines[0], r"^\x1b\[1mchannel    ready  delayed .*\x1b\[0m$")
        self.assertRegex(lines[1], r"^a              1        0 ")
        self.assertEqual(len(bodies.decode().splitlines()[1]), 70)
        self.assertTrue(bodies.decode().splitlines()[1].endswith("…"))
        self.assertIn(r"\x1b[2Jü", bodies.decode())
        with unittest.mock.patch.dict(os.environ, {"NO_COLOR": "1"}):
            self.assertNotIn(b"\x1b", self.run_command("channels", terminal=True)[1])

    def test_table_is_shortened_with_an_ellipsis_in_its_widest_column_and_never_in_a_number(self):
        heads, rows = ["channel", "ready", "error"], [["n" * 30, "9" * 12, "e" * 60]]
        for width, line in (
            (110, "n" * 30 + "  " + "9" * 12 + "  " + "e" * 60),
            (80, "n" * 30 + "  " + "9" * 12 + "  " + "e" * 33 + "…"),
            (66, "n" * 24 + "…  " + "9" * 12 + "  " + "e" * 24 + "…"),
            (40, "n" * 11 + "…  " + "9" * 12 + "  " + "e" * 11 + "…"),
            (20, "n" * 7 + "…  " + "9" * 12 + "  " + "e" * 7 + "…"),
        ):
            with self.subTest(width), unittest.mock.patch.dict(os.environ, COLUMNS=str(width)):
                self.assertEqual(linger._format_table(heads, rows)[1], line)
        with unittest.mock.patch.dict(os.environ, COLUMNS="20"):  # each of these takes two columns
            lines = linger._format_table(["a", "b"], [["你好" * 9, "x"], ["e\u0301" * 4, "y"]])
        self.assertEqual(lines[1:], ["你好你好你好你好…  x", "e\u0301" * 4 + " " * 15 + "y"])

    def test_terminal_gets_the_last_line_of_an_error(self):
        self.broker.post("q", b"x")
        self.broker.get("q")
        self.broker.release(1, reason="Traceback:\n  file.py\nValueError: no paper\n")
        _, table, _ = self.run_command("peek", "q", terminal=True)
        self.assertRegex(table.decode(), r"(?m)  ValueError: no paper  x$")
        self.assertIn(r"Traceback:\n  file.py\nValueError", self.linger("peek", "q"))

    def test_arguments_that_exclude_or_need_each_other_are_refused(self):
        def usage(command, name):
            """Returns an argument as it is given, with a value that is valid."""
            for flags, settings in linger._arguments_of(command):
                if name in (*flags, settings.get("metavar")):
                    takes_value = settings.get("action") in (None, "append")
                    value = [*settings.get("choices", ()), "1"][:takes_value]
                    return [name, *value] if name[0] == "-" else ["http://127.0.0.1:1"]
            raise AssertionError(f"{command.name} has no argument {name}")

        pairs = 0
        for command in linger.COMMANDS:
            names = {flags[0] for flags, _ in command.arguments}
            first = ["1"] * len(names & {"channel", "topic", "id"})
            for one, other, _ in command.excludes:
                with self.subTest(command.name, one=one, other=other):
                    given = [*first, *usage(command, one), *usage(command, other)]
                    errors = self.refused(command.name, *given)
                    self.assertIn(f"{one} and {other} exclude each other", errors)
                    pairs += 1
            for one, needed, _ in command.requires:
                with self.subTest(command.name, one=one, needed=needed):
                    errors = self.refused(command.name, *first, *usage(command, one))
                    self.assertIn(f"{one} needs {needed}", errors)
                    pairs += 1
        self.assertGreater(pairs, 10)

    def test_further_combinations_that_mean_nothing_are_refused(self):
        for arguments, reason in (
            (["get", "q", "--follow", "--wait", "0"], "--wait"),
            (["delete", 1, 2, "--lease", 3], "one ID"),
            (["bench", "--token", "T0ken"], "pass its URL"),
            (["stats", "--cafile", "/no/such/file"], "https"),
        ):
            with self.subTest(arguments):
                self.assertIn(reason, self.refused(*arguments))

    def test_options_may_stand_before_the_command(self):
        self.broker.post("get", b"x")
        for arguments in (
            ["--url", self.server.url, "get", "get"],
            [f"--url={self.server.url}", "--json", "get", "get", "--timeout", "1"],
            ["--timeout", "1", "--ack", "get", "get"],
        ):
            with self.subTest(arguments):
                self.assertIn("x", self.linger(*arguments))
                self.broker.release(1) if self.broker.channel_stats("get")["hidden"] else None
        self.assertIn("usage: linger get ", self.linger("--help", "get"))
        for arguments, reason in (
            (["--dbfile", "get", "--port", "x"], "--port must"),  # `get` is a value here
            (["--debug", "serve", "--port", "x"], "--port must"),
            (["--debug", "--port", "x"], "--port must"),
            (["--port", "1", "get", "q"], "get has no option --port"),
            (["--url", "x"], "the server has no option --url"),
            (["--nonsense", "get", "q"], "get has no option --nonsense"),
            (["-x"], "no option -x"),
        ):
            with self.subTest(arguments):
                self.assertIn(reason, self.refused(*arguments))
        self.assertEqual(self.run_command("-j2", "work", "q", "--once", "--", "true")[0], 1)

    def test_several_messages_are_deleted_and_missing_ones_named(self):
        for body in (b"a", b"b", b"c", b"d"):
            self.broker.post("q", body)
        self.hasten(MAX_BATCH=2)
        self.linger("delete", 1, 3, 3, 4)
        self.assertEqual(
            self.run_command("delete", 2, 8, 9),
            (1, b"", "linger: there is no message 8\nlinger: there is no message 9\n"),
        )
        self.assertEqual(self.broker.channel_stats("q")["ready"], 0)

    def test_backup_replaces_a_file_only_with_force_and_never_a_database_in_use(self):
        copy = self.folder / "copy.db"
        self.linger("backup", copy)
        old = copy.read_bytes()
        self.broker.post("q", b"x")
        self.assertIn("already a file", self.refused("backup", copy))
        self.assertEqual(copy.read_bytes(), old)
        self.linger("backup", "--force", copy)
        self.assertNotEqual(copy.read_bytes(), old)
        with contextlib.closing(linger.Store(str(copy))) as store:
            self.assertEqual(len(store.read("select id from messages")[0]), 1)
            self.assertIn("in use", self.refused("backup", "--force", copy))
        self.linger("backup", "--force", copy)
        self.assertEqual(list(self.folder.glob("copy.db?*part")), [])

    def test_publication_that_reaches_nobody_gives_a_hint(self):
        status, output, errors = self.run_command("publish", "news", "x")
        self.assertEqual((status, output, errors.count("\n")), (0, b"", 1))
        self.assertIn("linger subscribe CHANNEL news", errors)
        self.linger("subscribe", "mail", "news")
        self.assertEqual(self.linger("publish", "news", "x"), "mail\t1\n")
        self.linger("settings", "mail", "--hlm", "1")
        status, output, errors = self.run_command("publish", "news", "x")
        self.assertEqual((status, output), (0, b""))
        self.assertIn("high-level mark", errors)

    def test_terminal_gets_progress_and_whole_lines(self):
        errors = self.run_command("post", "q", "--lines", stdin=b"a\nb\n", terminal=True)[2]
        self.assertIn("2 posted", errors)
        self.assertEqual(self.run_command("get", "q", terminal=True)[1], b"a\n")

    def test_serve_refuses_names_and_values_that_an_option_cannot_have(self):
        for options, reason in (
            ({"prot": 0}, "unknown option prot: did you mean port?"),
            ({"max_conections": 1}, "did you mean max_connections?"),
            ({"zzz": 1}, "known are host, port, "),
            ({"hlm": "1"}, "hlm must be an integer$"),
            ({"hlm": True}, "hlm must be an integer$"),
            ({"hlm": None}, "hlm must be an integer$"),
            ({"hlm": -1}, "hlm must be an integer from 0 to "),
            ({"port": "8989"}, "port must be an integer$"),
            ({"port": 70_000}, "port must be an integer from 0 to 65535"),
            ({"host": 1}, "host must be a text"),
            ({"sync": "maybe"}, "sync must be one of full, normal, off"),
            ({"max_db_size": 1.5}, "max_db_size must be an integer"),
            ({"read_timeout": 0.0}, "read_timeout must be an integer"),
            ({"no_auth": "yes"}, "no_auth must be True or False"),
            ({"token": b"T0ken"}, "token must be a text"),
            ({"log_requests": 1}, "log_requests must be True or False"),
        ):
            with self.subTest(options), self.assertRaisesRegex(linger.BadRequest, reason):
                linger.serve(**options)
        with linger.serve(read_timeout=0.5, dbfile=self.folder / "x.db", tokens=None) as server:
            self.assertEqual(server.read_timeout, 0.5)

    def test_refused_start_leaves_no_file_and_changes_none(self):
        dbfile = self.folder / "new.db"
        tokens = self.folder / "tokens"
        tokens.touch(0o600)
        with socket.create_server(("127.0.0.1", 0)) as busy:
            for options, kind in (
                ({"hlm": "1"}, linger.BadRequest),
                ({"prot": 0}, linger.BadRequest),
                ({"host": "0.0.0.0"}, linger.BadRequest),
                ({"host": "203.0.113.1"}, OSError),
                ({"port": busy.getsockname()[1]}, OSError),
                ({"tokens": tokens}, linger.BadRequest),
                ({"tokens": "/no/such/file"}, linger.BadRequest),
                ({"cert": "/no/such/file"}, linger.LingerError),
                ({"key": "/no/such/file"}, linger.BadRequest),
                ({"cors": "nonsense"}, linger.BadRequest),
                ({"no_auth": True, "token": "T0ken"}, linger.BadRequest),
            ):
                with self.subTest(options), self.assertRaises(kind):
                    linger.serve(dbfile=dbfile, **options)
                self.assertEqual(list(self.folder.iterdir()), [tokens])
            sqlite3.connect(dbfile).executescript(V1_DATABASE).connection.close()
            old = dbfile.read_bytes()
            with self.assertRaises(OSError):  # perhaps of the 1.0.1 that still uses it
                linger.serve(port=busy.getsockname()[1], dbfile=dbfile)
            self.assertEqual(dbfile.read_bytes(), old)
            self.assertEqual(sorted(self.folder.iterdir()), [dbfile, tokens])

    def test_refused_file_gets_no_lock_beside_it(self):
        other = self.folder / "other"
        for write in (
            lambda: other.write_text("no database" * 99),
            lambda: other.write_bytes(b"short"),
            lambda: sqlite3.connect(other).execute("create table x (y)").connection.close(),
        ):
            write()
            for program in (linger.Store, lambda path: linger.serve(dbfile=path)):
                with self.assertRaises(linger.Unavailable):
                    program(str(other))
                self.assertEqual(list(self.folder.iterdir()), [other])
            other.unlink()
        with self.assertRaisesRegex(linger.Unavailable, "No such file"):
            linger.serve(dbfile=self.folder / "no" / "such.db")

    def test_start_without_threads_is_refused_and_can_be_tried_again(self):
        no_thread = RuntimeError("can't start new thread")
        refusing = unittest.mock.patch.object(threading.Thread, "start", side_effect=no_thread)
        with refusing, self.assertRaisesRegex(linger.Unavailable, "threads: can't start new"):
            linger.serve(dbfile=self.dbfile)
        linger.serve(dbfile=self.dbfile).close()

    def test_address_of_a_refused_start_is_free_again(self):
        self.folder.joinpath("text").write_text("no database" * 99)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with self.assertRaisesRegex(linger.Unavailable, "not a database"):
            linger.serve(port=port, dbfile=self.folder / "text")
        linger.serve(port=port).close()

    def test_broker_and_client_refuse_parameters_that_there_are_not(self):
        calls = (
            lambda kind, **names: kind.post("q", b"x", **names),
            lambda kind, **names: kind.publish("t", b"x", **names),
            lambda kind, **names: kind.subscribe("q", "t", **names),
            lambda kind, **names: kind.set_settings("q", **names),
            lambda kind, **names: linger.Client.post_batch(kind, "q", ["x"], **names),
            lambda kind, **names: linger.Client.publish_batch(kind, "t", ["x"], **names),
        )
        with linger.Client(self.server.url) as client:
            for call in calls:
                for kind in (client, self.broker)[: 2 if call in calls[:4] else 1]:
                    with self.assertRaisesRegex(linger.BadRequest, "unknown parameter tiemout: "):
                        call(kind, tiemout=3)
            with self.assertRaisesRegex(linger.BadRequest, "did you mean timeout?"):
                client.post("q", "x", tiemout=3)
            with self.assertRaisesRegex(linger.BadRequest, "did you mean dedup_for?"):
                self.broker.publish("t", b"x", dedup_fro=3)
        with self.assertRaisesRegex(TypeError, "tiemout"):
            self.broker.get("q", tiemout=3)
        self.assertEqual(self.broker.stats()["current-messages"], 0)

    def test_type_checkers_know_the_same_names_as_the_tables(self):
        classes = {
            node.name: {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
            for node in ast.walk(parse(SOURCE))
            if isinstance(node, ast.ClassDef)
        }

        def keys(table):
            return {p.name.replace("-", "_") for p in table}

        common = classes["MessageFields"]
        self.assertEqual(common, keys(linger.MESSAGE_PARAMETERS))
        post_fields = common | classes["PublishKeys"] | classes["PostFields"]
        self.assertEqual(post_fields, keys(linger.ALL_PARAMETERS))
        self.assertEqual(common | classes["ChannelFields"], keys(linger.CHANNEL_PARAMETERS))
        self.assertEqual(classes["PublishKeys"], keys(linger.PUBLISH_PARAMETERS))
        own = inspect.signature(linger.serve).parameters.keys() - {"options"}
        self.assertEqual(classes["ServerOptions"] | own, keys(linger.OPTIONS))

    @unittest.skipUnless(shutil.which("mypy"), "needs mypy")
    def test_mypy_finds_names_and_types_that_there_are_not(self):
        program = """
import linger
client = linger.Client()
broker = linger.Broker(linger.Store())
server = linger.serve(port=0, dbfile="x.db", hlm=1, read_timeout=0.5, tokens=None)
client.post("q", "x", timeout=3, dedup="a", dead=None)
client.set_settings("q", hlm=3)
broker.subscribe("q", "t", priority=3)
linger.serve(hlm="1")  # no
linger.serve(prot=0)  # no
client.post("q", "x", tiemout=3)  # no
client.post_batch("q", ["x"], timeout="3")  # no
client.publish("t", "x", unique="u")  # no
client.subscribe("q", "t", dedup="u")  # no
client.set_settings("q", dedup="u")  # no
broker.post("q", b"x", tiemout=3)  # no
broker.publish("t", b"x", dedup_fro=3)  # no
broker.get("q", tiemout=3)  # no
"""
        (self.folder / "program.py").write_text(program)
        found = subprocess.run(
            ["mypy", "--strict", f"--cache-dir={self.folder / 'cache'}", "program.py"],
            cwd=self.folder, env={**os.environ, "MYPYPATH": str(HERE)},
            capture_output=True, text=True,
        ).stdout  # fmt: skip
        expected = [n for n, line in enumerate(program.split("\n"), 1) if "# no" in line]
        lines = sorted({int(n) for n in re.findall(r"program.py:(\d+): error", found)})
        self.assertEqual(lines, expected, found)

    def test_each_option_of_the_server_is_a_parameter_of_its_receiver(self):
        for option in linger.OPTIONS:
            if option.receiver:
                with self.subTest(option.name):
                    receiver = inspect.signature(getattr(linger, option.receiver))
                    self.assertIn(option.key, receiver.parameters)

    def test_help_lists_all_commands_and_an_example_of_each(self):
        for command in linger.COMMANDS:
            with self.subTest(command.name):
                self.assertRegex(self.linger("--help"), rf"\n  {command.name} +\S")
                text = self.linger(command.name, "--help")
                self.assertIn(command.example if command.name != "serve" else "--dbfile", text)
                self.assertIn("\nexit status:\n  0  ", text)
                self.assertEqual(self.linger("help", command.name), text)
                if command.run:
                    self.assertIn("LINGER_TOKEN", text.partition("\nenvironment:\n")[2])
        self.assertEqual(self.linger("help"), self.linger("--help"))
        self.assertIn("no command psot", self.refused("help", "psot"))

    def test_help_tells_the_columns_and_the_variables_of_a_job(self):
        self.broker.subscribe("q", "news")
        self.broker.post("p", b"x")
        for arguments in (["publish", "news", "x"], ["peek", "q"], ["channels"], ["stats"]):
            _, table, _ = self.run_command(*arguments, terminal=True)
            columns = re.findall(r"\S+", table.decode().partition("\x1b[0m")[0][4:])
            self.assertIn("\n  " + ", ".join(columns) + "\n", self.linger("help", arguments[0]))
        variables = re.findall("LINGER_[A-Z_]+", self.linger("help", "work"))
        given = [name.decode() for name in linger._environment_of(self.broker.get("p"))]
        self.assertEqual(set(given).difference(variables), set())


class CommandProcessCase(ProcessCase):
    """Commands in processes of their own."""

    def setUp(self):
        super().setUp()
        server = linger.serve()
        self.addCleanup(server.close)
        self.connect(server.url)

    def connect(self, url):
        self.url = url
        self.client = linger.Client(url)
        self.addCleanup(self.client.close)

    def spawn(self, *arguments, program=None, first="", **options):
        """Starts a command; `first` is done in its process before, by a shell."""
        process = subprocess.Popen(
            ["sh", "-c", f'{first}\nexec "$@"', "sh", sys.executable, *STRICT,
             *(program or [compiled]), *arguments],
            env={**os.environ, "LINGER_URL": self.url},
            text=True,
            **{**dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE), **options},
        )  # fmt: skip
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def serve_apart(self):
        """Lets commands use a server that can be killed."""
        self.server = self.start()
        self.connect(f"http://127.0.0.1:{self.server.port}")

    def restart(self, number=signal.SIGKILL):
        port = self.server.port
        self.server.end(number)
        self.server = Process(f"--port={port}", "--dbfile", self.dbfile)
        self.addCleanup(self.server.end, signal.SIGKILL)


class ChangeCallTest(CommandCase, ClientCase):
    def test_a_message_is_changed_by_call_client_and_command(self):
        self.client.post("q", "x", delay=60)
        self.assertEqual(self.json("PATCH", "/messages/1?priority=3"), (204, None))
        self.client.change(1, timeout=77)
        self.linger("change", "1", "--delay", "0", "--dead", "failed")
        message = self.client.get("q", wait=0)
        self.assertEqual((message.priority, message.timeout), (3, 77))
        self.assertEqual(self.json("PATCH", "/messages/1?priority=3")[0], 409)
        self.assertEqual(self.json("PATCH", "/messages/2?priority=3")[0], 404)
        self.assertEqual(self.run_command("change", "2", "--priority", "3")[0], 1)
        self.assertEqual(self.json("PATCH", "/messages/1?linger=3")[0], 400)
        self.assertIn("nothing is to be changed", self.refused("change", "1"))

    def test_one_dead_letter_is_moved_back_by_call_client_and_command(self):
        for n in range(1, 4):
            self.client.post("q", "x", dead="failed")
            self.client.reject(n)
        self.assertEqual(self.json("POST", "/messages/1/redrive"), (204, None))
        self.client.redrive_message(2)
        self.assertEqual(self.linger("redrive", "--id", "3", "--to", "r"), "1\n")
        self.assertEqual(self.client.channel_stats("q")["ready"], 2)
        self.assertEqual(self.client.channel_stats("r")["ready"], 1)
        self.assertIn("no dead letter", self.refused("redrive", "--id", "3"))
        self.assertEqual(self.run_command("redrive", "--id", "9")[0], 1)
        for arguments in ((), ("q", "--id", 3), ("--count", 1), ("--count", 1, "--id", 3)):
            self.assertIn("one of them", self.refused("redrive", *arguments))

    def test_settings_are_changed_by_call_client_and_command(self):
        self.client.set_settings("q", timeout=60)
        self.client.change_settings("q", deliver=2)
        self.linger("settings", "q", "--keep", "--dead", "failed")
        self.assertEqual(self.json("PATCH", "/channels/q/settings", "hlm=5", FORM)[0], 204)
        expected = {"timeout": 60, "deliver": 2, "dead": "failed", "hlm": 5}
        self.assertEqual(self.client.settings("q"), expected)
        self.assertEqual(self.json("PATCH", "/channels/q/settings", "x")[0], 415)
        self.linger("settings", "q", "--timeout", "9")
        self.assertEqual(self.client.settings("q"), {"timeout": 9})


class CallReplyCallTest(CommandCase, ClientCase):
    def test_a_call_and_its_reply_by_call_and_client(self):
        for ask, answer in (
            (lambda: self.call("POST", "/channels/q/call?wait=9", "2 + 3")[2],
             lambda m: self.call("POST", f"/messages/{m.id}/reply?lease={m.lease}", b"5")),
            (lambda: self.client.call("q", "2 + 3", headers={"a": "1"}).text.encode(),
             lambda m: self.client.reply(m, "5")),
            (lambda: self.client.call("q", "2 + 3").text.encode(),
             lambda m: self.linger("reply", m.id, "5", "--lease", m.lease)),
        ):  # fmt: skip
            future = self.thread(ask)
            message = self.client.get("q")
            self.assertEqual(message.reply_to, f"/messages/{message.id}/reply")
            self.assertEqual(self.client.read_message(message.id)[0].reply_to, message.reply_to)
            answer(message)
            self.assertEqual(future.result(PATIENCE), b"5")

    def test_the_command_writes_the_reply(self):
        answer = self.thread(lambda: self.client.reply(self.client.get("q"), "5"))
        self.assertEqual(self.linger("call", "q", "2 + 3", "--wait", "9"), "5")
        answer.result(PATIENCE)

    def test_a_worker_replies_with_the_output_of_its_command(self):
        call = self.thread(self.client.call, "q", "1")
        until(lambda: self.broker.channel_stats("q")["ready"])
        self.client.post("q", "plain")
        work = ("work", "q", "--once", "--reply", "--", sys.executable, "-c")
        program = "import sys; t = sys.stdin.read(); t == '1' and print('re:', t, end='')"
        self.assertEqual(self.run_command(*work, program)[0], 0)
        self.assertEqual(call.result(PATIENCE).text, "re: 1")
        self.assertEqual(self.client.channel_stats("q"), {"ready": 0, "hidden": 0})

    def test_a_worker_whose_command_fails_or_says_too_much_sends_no_reply(self):
        self.broker.max_message = 100
        for program in ("print('x'); raise SystemExit(1)", "print('x' * 101)"):
            call = self.thread(lambda: self.client.call("q", "1", deliver=1))
            until(lambda: self.broker.channel_stats("q")["ready"])
            self.run_command("work", "q", "--once", "--reply", "--", sys.executable, "-c", program)
            self.assertEqual(call.exception(PATIENCE).status, 502)

    def test_the_type_of_a_reply_and_its_path_are_in_the_headers(self):
        future = self.thread(self.call, "POST", "/channels/q/call", "x")
        _, headers, _ = self.call("GET", "/channels/q")
        self.assertEqual(headers["x-linger-reply-to"], "/messages/1/reply")
        kind = {"Content-Type": "application/json"}
        self.assertEqual(self.call("POST", "/messages/1/reply", "{}", kind)[0], 204)
        self.assertEqual(future.result(PATIENCE)[1]["Content-Type"], "application/json")
        self.assertEqual(self.json("POST", "/messages/1/reply", "x")[0], 409)

    def test_no_reply_and_a_rejection(self):
        self.assertEqual(self.json("POST", "/channels/q/call?wait=0", "x")[0], 504)
        self.assertEqual(self.run_command("call", "q", "x", "--wait", "0")[:2], (1, b""))
        future = self.thread(self.json, "POST", "/channels/q/call", "x")
        self.client.reject(self.client.get("q"), "no")
        status, value = future.result(PATIENCE)
        self.assertEqual((status, "(deleted)" in value["error"]), (502, True))

    def test_a_call_of_a_client_that_has_gone_is_withdrawn(self):
        connection = self.connect()
        connection.sendall(
            b"POST /channels/q/call HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
        )
        until(lambda: self.broker.channel_stats("q")["ready"])
        connection.close()
        until(lambda: not self.broker.channel_stats("q")["ready"])

    def test_the_end_of_a_channel_is_awaited(self):
        self.assertTrue(self.client.drained("q"))
        self.client.post("q", "x")
        self.assertFalse(self.client.drained("q", 0))
        self.assertEqual(self.json("GET", "/channels/q/drained?wait=0")[0], 408)
        self.assertEqual(self.run_command("drained", "q", "--wait", "0")[:2], (1, b""))
        deletion = self.thread(lambda: self.client.delete(self.client.get("q")))
        self.assertEqual(self.linger("drained", "q"), "")
        deletion.result(PATIENCE)


class GroupCallTest(CommandCase, ClientCase):
    def test_a_group_is_shown_and_survives_a_dump(self):
        self.client.post("q", "1", group="cust 7")
        self.client.post_batch("q", ["2", ("3", None, {"group": "other"})], group="cust 7")
        self.linger("post", "q", "4", "--group", "cust 7", "--delay", "60")
        self.assertEqual(self.call("GET", "/channels/q")[1]["x-linger-group"], "cust%207")
        message = self.client.read_message(4)[0]
        self.assertEqual((message.group, message.delay), ("cust 7", 60))
        self.assertEqual(self.call("GET", "/messages/2")[1]["x-linger-state"], "blocked")
        peeked = self.linger("peek", "q", "--state", "blocked", "--json").splitlines()
        self.assertEqual([json.loads(line)["group"] for line in peeked], ["cust 7"] * 2)
        records = [{**record, "channel": "r"} for record in self.client.dump("q")]
        self.assertEqual(self.client.load(records), 4)
        states = [state for _, state in self.client.list_messages("r")]
        self.assertEqual(states, ["ready", "blocked", "ready", "blocked"])
        environment = linger._environment_of(self.client.get("r"))
        self.assertEqual(environment[b"LINGER_GROUP"], b"cust 7")

    def test_each_copy_of_a_publication_is_in_the_group(self):
        self.client.subscribe("q", "t")
        self.client.publish("t", "1", group="a")
        self.client.publish_batch("t", ["2"], group="a")
        self.linger("publish", "t", "3", "--group", "b")
        self.assertEqual(self.client.channel_stats("q"), {"ready": 2, "hidden": 1})


class OwnHeadersTest(CommandCase, ClientCase):
    """Headers that a message has of its own, from its post to its delivery."""

    JSON = types.MappingProxyType({"Content-Type": "application/json"})

    def own(self, query="", **headers):
        """What a message has that is posted with request headers (`_` for `-`); or the error."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        status, value = self.json("POST", f"/channels/q{query}", "x", fields)
        return self.broker.get("q").headers if status == 202 else value["error"]

    def test_they_are_delivered_as_they_were_sent(self):
        fields = {"X-Linger-H-Trace": "a: b, c", "x-linger-h-empty": "", "x-linger-ha": "no"}
        self.assertEqual(self.call("POST", "/channels/q", "x", fields)[0], 202)
        headers = self.call("GET", "/channels/q?timeout=1")[1]
        own = {n: v for n, v in headers.items() if n.startswith("x-linger-h-")}
        self.assertEqual(own, {"x-linger-h-trace": "a: b, c", "x-linger-h-empty": ""})
        listed = self.json("GET", "/channels/q/messages")[1][0]
        self.assertEqual(listed["headers"], {"trace": "a: b, c", "empty": ""})
        self.assertNotIn("header-lines", listed)
        self.broker.post("q", b"plain")
        self.assertNotIn("headers", self.json("GET", "/channels/q?n=1")[1][0])

    def test_text_in_utf_8_stays_as_it_is(self):
        name = {"x-linger-h-name": "¡olé! 你好".encode()}
        self.assertEqual(self.own(**name), {"name": "¡olé! 你好"})
        self.assertEqual(self.client.read_message(1)[0].headers, {"name": "¡olé! 你好"})
        self.assertIn("UTF-8", self.own(**{"x-linger-h-name": b"ol\xe9"}))

    def test_keep_names_other_headers_of_the_request(self):
        hook = {"X-Hub-Signature": "sha256=1", "User-Agent": "Hook/1", "x_linger_h_a": "1"}
        kept = self.own("?keep=x-hub-signature,%20User-Agent,Missing", **hook)
        self.assertEqual(kept, {"x-hub-signature": "sha256=1", "user-agent": "Hook/1", "a": "1"})
        self.assertEqual(self.own("?keep=", User_Agent="x"), {})
        self.assertIn("token", self.own("?keep=Authorization", Authorization="Bearer x"))

    def test_their_number_and_size_are_limited(self):
        most = {f"x-linger-h-n{n:02}": "v" * 61 for n in range(16)}
        self.assertEqual(len(self.own(**most)), 16)
        for refused in (
            {**most, "x-linger-h-n01": "v" * 62},
            {f"x-linger-h-n{n}": "" for n in range(17)},
            {"x-linger-h-a": ("ü" * 512).encode()},
        ):
            self.assertIn("16 headers", self.own(**refused))
        self.assertEqual(self.broker.stats()["current-messages"], 1)

    def test_an_item_of_a_batch_has_its_own_or_those_of_the_request(self):
        items = '[{"body": "1", "headers": {"A": "2"}}, {"body": "2", "headers": null}]'
        fields = {**self.JSON, "x-linger-h-common": "1"}
        self.assertEqual(self.json("POST", "/channels/q/batch", items, fields)[0], 202)
        self.assertEqual(self.broker.get("q").headers, {"a": "2"})
        self.assertEqual(self.broker.get("q").headers, {"common": "1"})

    def test_a_bad_item_of_a_batch_is_refused_with_its_index(self):
        for value in ('"x"', "1", '{"a": 1}', '{"a": null}', '{"a b": ""}', '{"a": "\\n"}',
                      '{"": ""}', '{"a": " x"}', '{"a": "\\ud800"}',
                      '{"\\ud800": ""}'):  # fmt: skip
            items = f'[{{"body": "1"}}, {{"body": "2", "headers": {value}}}]'
            status, error = self.json("POST", "/channels/q/batch", items, dict(self.JSON))
            self.assertEqual((status, error["index"]), (400, 1), value)
            self.assertIn("headers", error["error"])
        for field in ("timeout", "dead", "backoff", "unique", "type", "encoding", "body"):
            items = f'[{{"body": "1", "{field}": {{"a": "1"}}}}]'
            status, error = self.json("POST", "/channels/q/batch", items, dict(self.JSON))
            self.assertEqual((status, error["index"]), (400, 0), field)
        for nested in ('{"a": {}}', "[]", '{"a": []}'):
            items = f'[{{"body": "2", "headers": {nested}}}]'
            self.assertEqual(self.call("POST", "/channels/q/batch", items, dict(self.JSON))[0], 400)
        self.assertEqual(self.broker.stats()["current-messages"], 0)

    def test_they_survive_dead_letters_an_undo_and_a_dump(self):
        own = {"a": "1", "b": "ü"}
        for hlm in (0, 1):
            self.broker.set_settings("q", hlm=hlm)
            self.client.post("q", "x", headers=own, dead="failed")
            self.client.reject(self.client.get("q"))
            self.assertEqual(self.client.redrive("failed"), 1)
            consumer = self.broker.consumer(["q"], auto=True)
            self.broker.undo_take(consumer, self.broker.take(consumer))
            self.client.load({**record, "channel": "r"} for record in list(self.client.dump("q")))
            self.assertEqual(self.client.get("r", ack=None).headers, own)
            self.client.delete(self.client.get("q"))

    def test_each_copy_of_a_publication_has_them(self):
        self.client.subscribe("q", "t")
        self.client.publish("t", "1", headers={"a": "1"})
        self.client.publish_batch("t", ["2", ("3", None, {"headers": {"b": "2"}})])
        self.json("POST", "/topics/t?keep=User-Agent", "4", {"User-Agent": "x"})
        listed = [message.headers for message, _ in self.client.list_messages("q")]
        self.assertEqual(listed, [{"a": "1"}, {}, {"b": "2"}, {"user-agent": "x"}])

    def test_only_a_message_can_have_them(self):
        for path in ("/channels/q/settings", "/channels/q/topics/t"):
            status, value = self.json("PUT", path + "?headers=x")
            self.assertEqual((status, "headers can be given only" in value["error"]), (400, True))
        self.assertIn("x-linger-h-", self.own("?headers=x"))
        for own in ({"a": "1", "A": "2"}, {"a\r\nb": "1"}, {"a": "1\r\nb: 2"}):
            with self.assertRaises(linger.BadRequest):
                self.client.post("q", "x", headers=own)
        self.assertEqual(self.broker.stats()["current-messages"], 0)

    def test_commands_give_and_show_them(self):
        self.linger("post", "q", "x", "--header", "Trace-Id: 7", "--header", "b:")
        shown = json.loads(self.linger("get", "q", "--json"))
        self.assertEqual(shown["headers"], {"trace-id": "7", "b": ""})
        self.linger("post", "q", "--lines", "--header", "a:1", stdin=b"1\n2\n")
        self.assertEqual(self.broker.get("q").headers, {"a": "1"})
        self.linger("subscribe", "r", "t")
        self.linger("publish", "t", "x", "--header", "a: 1")
        self.assertEqual(self.broker.get("r").headers, {"a": "1"})
        environment = linger._environment_of(linger.parse_message(shown))
        self.assertEqual(environment[b"LINGER_H_TRACE_ID"], b"7")
        self.linger("post", "s", "x", "--header", "!#$%&'*+-.^_`|~: 1")
        self.assertEqual(self.broker.get("s").headers, {"!#$%&'*+-.^_`|~": "1"})
        refused = self.refused("post", "q", "x", "--header", "a b: 1")
        self.assertIn("letters, digits and !#$%&'*+-.^_`|~: a b", refused)
        self.assertIn("NAME:VALUE", self.refused("post", "q", "x", "--header", "a 1"))
        for twice in (("a:1", "--header", "a:2"), ("a:1", "--header", "A:2")):
            refused = self.refused("post", "q", "x", "--header", *twice)
            self.assertIn("different name", refused)


class PatternCallTest(CommandCase, ClientCase):
    """Patterns over HTTP, with the client and the commands."""

    def test_it_is_subscribed_listed_and_ended(self):
        path = "/channels/q/patterns/a.%23"
        self.assertEqual(self.call("PUT", path, "priority=3", FORM)[0], 204)
        self.assertEqual(self.json("GET", "/patterns"), (200, {"patterns": ["a.#"]}))
        self.assertEqual(self.json("GET", "/channels/q/patterns")[1], {"patterns": ["a.#"]})
        self.assertEqual(self.json("POST", "/topics/a.b", "x"), (202, {"q": 1}))
        self.assertEqual(self.broker.get("q").priority, 3)
        self.assertEqual(self.client.stats()["current-subscriptions"], 1)
        self.assertEqual(self.call("DELETE", path)[0], 204)
        self.assertEqual(self.client.patterns(), [])
        status, value = self.json("PUT", f"{path}?since=all")
        self.assertEqual((status, self.client.patterns()), (400, []))
        self.assertIn("since belongs to a topic", value["error"])

    def test_who_gets_what_is_published_on_a_topic_is_told(self):
        for channel, pattern in (("p", "a.#"), ("q", "a.#"), ("q", "#.b"), ("q", "x")):
            self.client.subscribe_pattern(channel, pattern)
        patterns = {"#.b": ["q"], "a.#": ["p", "q"]}
        answer = self.json("GET", "/topics/a.b/channels")
        self.assertEqual(answer, (200, {"channels": [], "patterns": patterns}))
        self.client.subscribe("q", "a.b")
        self.assertEqual(self.client.subscribers("a.b"), ["q"])
        self.assertEqual(self.client.pattern_subscribers("a.b"), patterns)
        lines = "q\t-\nq\t#.b\np\ta.#\nq\ta.#\n"
        self.assertEqual(self.linger("subscribers", "a.b"), lines)
        self.client.subscribe("q", "c")
        self.assertEqual(self.json("GET", "/topics/c/channels")[1], {"channels": ["q"]})
        self.assertEqual(self.linger("subscribers", "c"), "q\n")
        self.assertEqual(self.client.info("q")["patterns"], ["#.b", "a.#", "x"])

    def test_a_publication_that_full_channels_miss_says_so(self):
        self.client.subscribe_pattern("q", "a.#")
        self.client.set_settings("q", hlm=1)
        self.linger("publish", "a.b", "1")
        self.assertIn("high-level mark", self.run_command("publish", "a.b", "2")[2])

    def test_the_commands_subscribe_list_and_unsubscribe(self):
        self.linger("subscribe", "q", "a.#", "--pattern", "--timeout", 7)
        self.assertEqual(self.linger("patterns"), "a.#\n")
        self.assertEqual(self.linger("publish", "a.b", "x"), "q\t1\n")
        self.assertEqual(self.broker.get("q").timeout, 7)
        self.linger("unsubscribe", "q", "a.#", "--pattern")
        self.nothing("patterns", "q")


class PatternTokenTest(ServerTest):
    """A token with patterns of its own sees and subscribes only what they cover."""

    def setUp(self):
        tokens = self.write_tokens(
            "a t0ken read,write,admin q* topic:news-* topic:x.y topic:z.*.z\n"
        )
        self.options = {"tokens": str(tokens)}
        super().setUp()

    def test_a_pattern_must_be_covered_with_all_that_matches_it(self):
        for pattern, covered in (
            ("news-eu.*", True), ("news-.%23", True), ("news-%23", True), ("news-a", True),
            ("x.y", True), ("z.a.z", True),
            ("%23", False), ("*", False), ("news.*", False), ("*.news-a", False), ("x.*", False),
            ("z.*.z", False), ("z.%23", False), ("news-", True), ("x.y.%23", False),
        ):  # fmt: skip
            path = f"/channels/q/patterns/{pattern}"
            for method in ("PUT", "DELETE", "PUT"):
                status = self.call(method, path, None, bearer("t0ken"))[0]
                self.assertEqual(status == 204, covered, pattern)
            live = self.call("HEAD", f"/patterns/{pattern}/live", None, bearer("t0ken"))[0]
            self.assertEqual(live == 200, covered, pattern)
        self.assertEqual(
            self.call("PUT", "/channels/p/patterns/x.y", None, bearer("t0ken"))[0], 403
        )

    def test_a_pattern_is_covered_by_what_all_its_topics_begin_with(self):
        grant = linger.parse_grant("read", ["topic:s.*", "topic:?.u*"])
        covered = [grant.covers("patterns", p) for p in ("s.*", "s.a.#", "a.u.#", "s.#", "*.u.#")]
        self.assertEqual(covered, [True, True, True, False, False])  # s.# is also s itself

    def test_lists_leave_out_the_others(self):
        for pattern in ("#", "news-a.#", "news.#"):
            self.broker.patterns.subscribe("q", pattern)
        for path in ("/patterns", "/channels/q/patterns"):
            listed = self.json("GET", path, None, bearer("t0ken"))
            self.assertEqual(listed, (200, {"patterns": ["news-a.#"]}))
        info = self.json("GET", "/channels/q/info", None, bearer("t0ken"))[1]
        self.assertEqual(info["patterns"], ["news-a.#"])
        self.broker.patterns.subscribe("other", "news-a.#")
        self.broker.patterns.subscribe("other", "news-a.*")
        found = self.json("GET", "/topics/news-a.b/channels", None, bearer("t0ken"))[1]
        self.assertEqual(found, {"channels": [], "patterns": {"news-a.#": ["q"]}})


class RetentionCallTest(CommandCase, ClientCase):
    """Kept publications over HTTP."""

    def stream(self, query="", last_id=None, path="/topics/t"):
        """A connection to the stream of the topic, as server-sent events, after its head."""
        connection = self.connect()
        header = "" if last_id is None else f"Last-Event-ID: {last_id}\r\n"
        request = f"GET {path}/live{query} HTTP/1.0\r\nHost: x\r\n{header}\r\n"
        connection.sendall(request.encode())
        file = connection.makefile("rb")
        self.addCleanup(file.close)
        while file.readline() not in (b"\r\n", b""):
            pass
        return file

    def read(self, stream, n):
        """The ids and bodies of the next n events."""
        events, id = [], 0
        while len(events) < n:
            line = stream.readline()
            self.assertTrue(line, "the stream has ended")
            if line.startswith(b"id: "):
                id = int(line[4:])
            elif line.startswith(b"data: "):
                events.append((id, json.loads(line[6:])["body"]))
        return events

    def test_settings_and_kept_publications(self):
        path = "/topics/t/settings"
        self.assertEqual(self.call("PUT", path, "keep=2&keep-for=60", FORM)[0], 204)
        self.assertEqual(self.json("GET", path), (200, {"keep": 2, "keep-for": 60}))
        _, headers, _ = self.call("POST", "/topics/t", "1", {"x-linger-h-a": "1"})
        self.assertEqual(headers["x-linger-publication"], "1")
        self.assertEqual(self.client.publish("t", "x" * 2_000).publications, range(2, 3))
        first, second = self.json("GET", "/topics/t/messages?since=0&n=5")[1]
        self.assertEqual(first, {"id": 1, "topic": "t", "type": "text/plain", "headers": {"a": "1"},
                                 "body": "1"})  # fmt: skip
        self.assertEqual((len(second["body"]), second["cut"]), (1_024, True))
        self.assertEqual(len(self.client.publications("t", since="1")[0]["body"]), 2_000)
        self.client.subscribe("q", "t", since="all")
        self.assertEqual(self.client.channel_stats("q")["ready"], 2)
        batch = {"Content-Type": "application/x-ndjson"}
        _, headers, _ = self.call("POST", "/topics/t/batch", "3\n4\n", batch)
        self.assertEqual(headers["x-linger-publication"], "3-4")
        with unittest.mock.patch.object(linger.os, "urandom", return_value=b"k"):
            for _ in range(2):  # the second one as if the response had been lost
                copies = self.client.publish_batch("t", ["5"], retry=True)
        self.assertEqual((copies, copies.publications), ({"q": [5]}, range(5, 6)))
        self.assertEqual(self.call("DELETE", path)[0], 204)
        self.assertEqual(self.client.publications("t"), [])
        self.assertFalse(self.client.publish("t", "6").publications)
        self.assertEqual(self.json("PUT", path)[0], 400)

    def test_whole_bodies_come_in_pages(self):
        self.hasten(MAX_BATCH_BYTES=200_000)
        self.client.set_topic_settings("t", keep=9)
        for n in range(4):
            self.broker.publish("t", bytes([n]) * 100_000)
        first = self.json("GET", "/topics/t/messages?whole")[1]
        self.assertEqual([(p["id"], len(p["body"]), "cut" in p) for p in first],
                         [(1, 100_000, False), (2, 100_000, False)])  # fmt: skip
        self.assertEqual([p["id"] for p in self.client.publications("t", since="1")], [2, 3, 4])
        self.assertEqual([p["id"] for p in self.client.publications("t", n=3)], [1, 2, 3])

    def test_the_client_goes_on_where_it_was_after_an_outage(self):
        self.client.set_topic_settings("t", keep=9)
        self.client.publish("t", "1")
        events = self.client.live(topic="t", since="all")
        seen = [next(events)]
        with unittest.mock.patch.object(linger, "MIN_RETRY_DELAY", 0.01):
            for connection in list(self.client._transport._connections):
                connection.shutdown()
            self.client.publish("t", "2")
            seen.append(next(events))
        events.close()
        read = [(event.message.id, event.message.text, event.gap) for event in seen]
        self.assertEqual(read, [(1, "1", False), (2, "2", False)])

    def test_the_client_says_that_events_may_be_missing_unless_all_are_kept(self):
        event, outage = {"topic": "t", "type": "x/y", "body": "x"}, linger.Unavailable("gone")
        for given, first, query, gap in (
            ({"topic": "t"}, {}, {}, True),
            ({"topic": "t", "since": "all"}, {}, {"since": "all"}, True),
            ({"topic": "t", "since": "5m"}, {"id": 7}, {"since": "7"}, False),
            ({"topic": "t"}, {"id": 7}, {"since": "7"}, False),
            ({"pattern": "#"}, {"id": 7}, {"since": "7"}, True),
            ({"channel": "q"}, {"id": 7}, {}, True),
        ):
            first, second = json.dumps({**event, **first}), json.dumps(event)
            streams = [iter([first.encode()]), outage, iter([second.encode()])]
            transport = unittest.mock.patch.object(
                self.client._transport, "stream", side_effect=streams
            )
            warn = unittest.mock.patch.object(self.client._transport, "warn")
            with transport as stream, warn as warned, self.subTest(given):
                delays = unittest.mock.patch.object(linger, "MIN_RETRY_DELAY", 0.001)
                with delays, contextlib.closing(self.client.live(**given)) as events:
                    self.assertEqual([next(events).gap, next(events).gap], [False, gap])
                self.assertEqual(stream.call_args.args[-1], query)
                self.assertEqual("missing" in warned.call_args.args[0], gap)

    def test_a_client_reads_what_matches_a_pattern(self):
        events = self.client.live(pattern="a.#")
        publisher = self.thread(
            lambda: (
                until(lambda: self.broker._state.live.patterns) or self.client.publish("a.b", "x")
            )
        )
        self.assertEqual(next(events).message.topic, "a.b")
        publisher.result(PATIENCE)
        events.close()
        with self.assertRaises(linger.BadRequest):
            next(self.client.live("q", pattern="a"))

    def test_the_commands_keep_list_replay_and_clear(self):
        self.linger("retention", "t", "--keep", 3, "--keep-for", 60)
        self.assertEqual(self.linger("retention", "t"), "keep\t3\nkeep-for\t60\n")
        self.client.publish("t", "1")
        self.assertEqual(self.linger("publications", "t"), "1\ttext/plain; charset=utf-8\t1\n")
        self.nothing("publications", "t", "--since", "1")
        self.client.publish("t", b"\xff\n")
        listed = self.linger("publications", "t", "--since", "1")
        self.assertEqual(listed, "2\ttext/plain\t\ufffd\\n\n")
        self.linger("subscribe", "q", "t", "--since", "all")
        self.assertEqual(self.broker.get("q").body, b"1")
        for arguments in (("t",), ("#", "--pattern")):
            listened = self.linger("listen", *arguments, "--since", "all", "--count", 1, "--json")
            self.assertEqual(json.loads(listened)["id"], 1)
        self.linger("retention", "t", "--clear")
        self.nothing("retention", "t")

    def test_a_stream_begins_with_what_was_kept(self):
        self.client.set_topic_settings("t", keep=100)
        for n in range(40):
            self.client.publish("t", str(n))
        stream = self.stream("?since=all")
        self.assertEqual(self.read(stream, 40), [(n + 1, str(n)) for n in range(40)])
        self.client.publish("t", "new")
        self.assertEqual(self.read(stream, 1), [(41, "new")])
        self.assertEqual(self.read(self.stream("?since=all", last_id=40), 1), [(41, "new")])
        self.assertEqual(self.json("GET", "/topics/t/live?since=x")[0], 400)
        for method in ("GET", "HEAD"):
            self.assertEqual(self.call(method, "/channels/q/live?since=all")[0], 400)
        self.assertEqual(self.json("GET", "/patterns/%23/live?since=x")[0], 400)

    def replay_until(self, end):
        """What is sent of a replay of 40 publications, and the log; `end` is called before its
        second page is read."""

        def kept(*arguments):
            if pages:
                end()
            pages.append(read(*arguments))
            return pages[-1]

        self.client.set_topic_settings("t", keep=100)
        for n in range(40):
            self.broker.publish("t", b"%d" % n)
        pages, read = [], self.broker.retention._kept
        patch = unittest.mock.patch.object(self.broker.retention, "_kept", kept)
        with patch, contextlib.redirect_stderr(io.StringIO()) as log, self.connect() as connection:
            connection.sendall(b"GET /topics/t/live?since=all HTTP/1.1\r\nHost: x\r\n\r\n")
            with connection.makefile("rb") as file:
                return file.read(), log.getvalue()

    def test_a_stop_ends_a_replay_properly(self):
        sent, _ = self.replay_until(self.broker._state.live.close)
        self.assertEqual((sent.count(b"id: "), sent[-5:]), (32, b"0\r\n\r\n"))

    def test_an_error_of_the_database_breaks_a_replay_off(self):
        failing = unittest.mock.Mock(side_effect=linger.Unavailable("no node answers"))
        sent, log = self.replay_until(failing)
        self.assertEqual((sent.count(b"id: "), sent[-4:], log), (16, b"\n\n\r\n", ""))

    def read_in_parts(self, path, n):
        """The next n events, by a reader that connects again and again."""
        chance, seen, last_id = random.Random(7), [], 0
        while len(seen) < n:
            stream = self.stream("?since=all", last_id or None, path)
            events = self.read(stream, min(chance.randint(1, 5), n - len(seen)))
            stream.close()
            seen += events
            last_id = events[-1][0]
        return seen

    def test_a_reader_that_connects_again_and_again_sees_each_publication_once(self):
        self.client.set_topic_settings("t", keep=1_000)
        publisher = self.thread(lambda: [self.broker.publish("t", b"%d" % n) for n in range(300)])
        seen = self.read_in_parts("/topics/t", 300)
        publisher.result(PATIENCE)
        self.assertEqual(seen, [(n + 1, str(n)) for n in range(300)])

    def test_so_does_a_reader_of_a_pattern(self):
        chance, topics = random.Random(8), ["a", "a.b", "a.b.c", "a.d", "b.a"]
        for topic in topics:
            self.client.set_topic_settings(topic, keep=1_000)
        topics = [chance.choice(topics) for _ in range(400)]
        publisher = self.thread(lambda: [self.broker.publish(topic, b"x") for topic in topics])
        expected = [(n + 1, "x") for n, topic in enumerate(topics) if topic != "b.a"]
        seen = self.read_in_parts("/patterns/a.%23", len(expected))
        publisher.result(PATIENCE)
        self.assertEqual(seen, expected)


class ScheduleCallTest(CommandCase, ClientCase):
    """Schedules over HTTP, with the client and the commands."""

    def test_it_is_set_shown_and_deleted(self):
        path = "/schedules/a%2Fb?channel=q&cron=0+3+*+*+*&tz=UTC&catch-up=no&priority=3"
        self.assertEqual(self.call("PUT", path, b"\xff", {"x-linger-h-a": "1"})[0], 204)
        status, shown = self.json("GET", "/schedules/a%2Fb")
        self.assertEqual(status, 200)
        self.assertTrue(shown.pop("next").endswith("T03:00:00+00:00"))
        self.assertLessEqual(shown.pop("next-in"), 86_400)
        self.assertEqual(shown, {
            "name": "a/b", "channel": "q", "cron": "0 3 * * *", "tz": "UTC", "catch-up": False,
            "last": None, "last-id": None, "last-error": None, "priority": 3, "headers": {"a": "1"},
            "type": "text/plain", "body": "/w==", "encoding": "base64",
        })  # fmt: skip
        self.assertEqual(self.json("POST", "/schedules/a%2Fb/run"), (202, {"id": 1}))
        self.assertEqual(self.broker.get("q").headers, {"a": "1"})
        self.assertEqual(self.call("DELETE", "/schedules/a%2Fb")[0], 204)
        self.assertEqual(self.call("DELETE", "/schedules/a%2Fb")[0], 404)
        self.assertEqual(self.json("GET", "/schedules"), (200, {"schedules": []}))

    def test_a_body_may_be_as_long_as_a_message(self):
        body = "ä" * 100_000
        path = "/schedules/s?channel=q&every=9&unique=k&dedup=k"
        _, headers, _ = self.call("PUT", path, body.encode(), {"Idempotency-Key": "k"})
        self.assertEqual(headers["x-linger-ignored"], "dedup")
        self.assertEqual(self.client.read_schedule("s")["body"], body)
        (listed,) = self.client.schedules()
        self.assertEqual((listed["body"], listed["cut"]), ("ä" * 512, True))
        self.assertEqual(self.call("PUT", path, "x" * 300_000)[0], 413)
        self.assertEqual(self.client.run_schedule("s"), (1, False))
        self.assertEqual(self.client.run_schedule("s"), (1, True))

    def test_a_form_may_hold_the_message_and_all_parameters(self):
        form = "msg=Hi&channel=q&cron=%2A/5+*+*+*+*"
        self.assertEqual(self.call("PUT", "/schedules/s", form, FORM)[0], 204)
        shown = self.client.read_schedule("s")
        self.assertEqual((shown["body"], shown["cron"]), ("Hi", "*/5 * * * *"))
        self.assertIn("channel", self.json("PUT", "/schedules/s?every=9", "x")[1]["error"])

    def test_the_client_sets_and_deletes_it(self):
        self.client.schedule("s", "q", {"a": 1}, every=60, catch_up=False, headers={"A": "ö"})
        shown = self.client.read_schedule("s")
        self.assertEqual(
            [shown[name] for name in ("body", "type", "every", "catch-up", "headers")],
            ['{"a":1}', "application/json", 60, False, {"a": "ö"}],
        )
        self.client.unschedule("s")
        for call in (self.client.unschedule, self.client.read_schedule, self.client.run_schedule):
            self.assertRaises(linger.NotFound, call, "s")

    def test_the_commands_set_show_run_and_delete_it(self):
        self.linger("schedule", "s", "q", "--cron", "0 3 * * *", "--no-catch-up", stdin=b"Report")
        name, channel, times, _, last, error = self.linger("schedules").rstrip("\n").split("\t")
        self.assertEqual((name, channel, times, last, error), ("s", "q", "0 3 * * * UTC", "-", "-"))
        self.assertIn("body\tReport\n", self.linger("schedule", "s"))
        self.assertEqual(self.linger("schedule", "s", "--run"), "1\n")
        self.linger("schedule", "s", "q", "x", "--every", 9, "--priority", 2)
        self.assertEqual(json.loads(self.linger("schedules", "--json"))["every"], 9)
        self.linger("schedule", "s", "--delete")
        self.nothing("schedule", "s")
        self.nothing("schedules")
        self.assertIn("either", self.refused("schedule", "s", "q", "x"))
        self.linger("schedule", "s", "q", "x", "--every", 9, "--header", "a: b")
        self.assertIn('headers\t{"a":"b"}\n', self.linger("schedule", "s"))
        for option in (["--every", 9], ["--priority", 9], ["--header", "a:b"], ["--no-catch-up"]):
            self.assertIn("needs CHANNEL", self.refused("schedule", "s", *option))


class CommandProcessTest(CommandProcessCase):
    """Signals, pipes and restarts, which need a process."""

    def test_lines_are_posted_as_they_arrive_and_an_interrupt_reports_how_many(self):
        process = self.spawn("post", "q", "--lines")
        for count, lines in ((1, "a\n"), (2, "b\nc")):
            process.stdin.write(lines)
            process.stdin.flush()
            until(lambda n=count: self.client.channel_stats("q")["ready"] == n)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 130)
        self.assertRegex(errors, r"^linger: ([12]) messages were posted .*, up to line \1\n$")

    def test_closed_pipe_causes_no_traceback(self):
        self.client.post_batch("q", [f"line {n} " + "x" * 1_000 for n in range(500)])
        process = self.spawn("get", "q", "--ack", "--count", "500")
        self.assertTrue(process.stdout.readline().startswith("line 0 "))
        process.stdout.close()
        self.assertEqual(process.wait(PATIENCE), 128 + signal.SIGPIPE)
        self.assertEqual(process.stderr.read(), "")
        left = self.client.channel_stats("q")
        self.assertGreater(left["ready"], 0)
        self.assertEqual(left["hidden"], 0)

    def test_help_for_a_closed_pipe_causes_no_traceback(self):
        reader, writer = os.pipe()
        os.close(reader)
        with unittest.mock.patch.dict(os.environ, PYTHONUNBUFFERED=""):
            process = self.spawn("--help", stdout=writer)
        os.close(writer)
        self.assertEqual(process.communicate(timeout=PATIENCE)[1], "")
        self.assertEqual(process.returncode, 128 + signal.SIGPIPE)

    def spawn_without(self, streams, *arguments, **options):
        """Runs a command whose standard streams of these numbers are closed."""
        closed = " ".join(f"{number}>&-" for number in streams)
        script = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, *STRICT, compiled]
        return subprocess.run(
            [*script, *arguments], env={**os.environ, "LINGER_URL": self.url},
            capture_output=True, text=True, timeout=PATIENCE, **options,
        )  # fmt: skip

    def test_a_closed_standard_output_is_refused_before_anything_is_done(self):
        self.client.post("p", "x")
        for command in (["post", "q", "x"], ["get", "p", "--auto"], ["help", "get"]):
            ended = self.spawn_without([1], *command)
            self.assertEqual(ended.returncode, 2, ended)
            self.assertRegex(ended.stderr, r"^linger: standard output is closed: [^\n]*\n$")
        self.assertEqual(self.client.channel_stats("p"), {"ready": 1, "hidden": 0})
        self.assertEqual(self.client.channels(), ["p"])

    def test_a_closed_standard_input_is_an_empty_one(self):
        for command, said in (
            (["post", "q"], "message is empty"),
            (["post", "q", "-"], "message is empty"),
            (["drain", "q"], "--yes"),
        ):
            ended = self.spawn_without([0], *command)
            self.assertEqual((ended.returncode, ended.stderr.count("\n")), (2, 1), ended)
            self.assertIn(said, ended.stderr)
        for command in (["post", "q", "--lines"], ["load"]):
            ended = self.spawn_without([0], *command)
            self.assertEqual((ended.returncode, ended.stdout, ended.stderr), (0, "0\n", ""))

    def test_a_message_that_does_not_fit_into_an_unbuffered_file_is_given_back(self):
        self.client.post("q", b"x" * 10_000)
        unbuffered = unittest.mock.patch.dict(os.environ, PYTHONUNBUFFERED="1")
        with tempfile.TemporaryFile() as file, unbuffered:
            limit = "ulimit -f 8"  # times 512 bytes
            process = self.spawn("get", "q", "--ack", stdout=file, first=limit)
            _, errors = process.communicate(timeout=PATIENCE)
        self.assertEqual(errors, "linger: cannot write to standard output: File too large\n")
        self.assertEqual(process.returncode, 2)
        self.assertEqual(self.client.channel_stats("q"), {"ready": 1, "hidden": 0})

    def test_an_input_that_does_not_block_is_read_to_its_end(self):
        for lines, expected in (([], [200_000]), (["--lines"], [199_999])):
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            os.write(writer, b"x")
            process = self.spawn("post", "q", *lines, stdin=reader)
            until(lambda reader=reader: not select.select([reader], [], [], 0)[0])  # it was read
            with contextlib.suppress(BrokenPipeError), open(writer, "wb", buffering=0) as file:
                os.close(reader)
                file.write(b"x" * 199_998 + b"\n")
            self.assertEqual(process.communicate(timeout=PATIENCE)[1], "")
            found = [len(m.body) for m in iter(lambda: self.client.get("q", 0, auto=True), None)]
            self.assertEqual(found, expected)

    def test_an_output_that_would_block_loses_no_message(self):
        self.client.post("q", b"x" * 200_000)  # a pipe takes 65,536 bytes
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        os.set_blocking(writer, False)
        with open(writer, "wb") as file, unittest.mock.patch.dict(os.environ, PYTHONUNBUFFERED="1"):
            process = self.spawn("get", "q", "--ack", stdout=file)
            _, errors = process.communicate(timeout=PATIENCE)
        self.assertRegex(errors, "^linger: cannot write to standard output: .*unavailable\n$")
        self.assertEqual(self.client.channel_stats("q"), {"ready": 1, "hidden": 0})

    def test_follow_survives_a_restart_and_ends_gracefully(self):
        self.serve_apart()
        self.client.post("q", "a")
        process = self.spawn("get", "q", "--follow", "--ack")
        self.assertEqual(process.stdout.readline(), "a\n")
        self.restart()
        self.client.post("q", "b", retry=True)
        self.assertEqual(process.stdout.readline(), "b\n")
        until(lambda: not any(self.client.channel_stats("q").values()))
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=PATIENCE)
        self.assertRegex(errors, r"^(linger: .*; trying again\n)+$")
        self.assertEqual((process.returncode, output), (128 + signal.SIGTERM, ""))


def is_alive(pid):
    """Returns whether a process runs; a zombie does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


class WorkTest(CommandCase):
    """`linger work`, in this process, with real commands."""

    def work(self, *arguments, channel="q", status=0):
        """Works until the channel is empty; returns what was written to standard error."""
        ended, _, errors = self.run_command("work", channel, *arguments)
        self.assertEqual(ended, status, errors)
        return errors

    def shell(self, script, *options, **more):
        return self.work(*options, "--once", "--", "sh", "-c", script, **more)

    def counts(self, channel="q"):
        info = self.broker.info(channel)
        return info["ready"], info["delayed"], info["in-flight"]

    def test_command_gets_body_and_fields_and_its_success_deletes(self):
        self.broker.subscribe("q", "news", priority=7)
        body = bytes(range(256))
        self.broker.publish("news", body, "image/x")
        out = self.folder / "out"
        self.assertEqual(self.shell(f"cat > {out}; env | grep ^LINGER_ | sort >> {out}"), "")
        taken, _, variables = out.read_bytes().rpartition(body)
        self.assertEqual(taken, b"")
        for line in (
            "CHANNEL=q", "DELIVERED=1", "ERROR=", "LEASE=1", "MESSAGE_ID=1", "PRIORITY=7",
            "TOPIC=news", "TYPE=image/x", f"URL={self.server.url}",
        ):  # fmt: skip
            self.assertIn(f"LINGER_{line}\n", variables.decode())
        self.assertEqual(self.counts(), (0, 0, 0))

    def test_failure_releases_with_the_end_of_standard_error(self):
        self.broker.post("q", b"x")
        errors = self.shell("echo out of paper >&2; exit 3")
        self.assertEqual(errors, "out of paper\nlinger: message 1 of q: exit status 3\n")
        self.assertEqual(self.broker.read_message(1)[0].error, "exit status 3: out of paper")
        self.assertEqual(self.counts(), (0, 1, 0))
        self.broker.post("q", b"x")
        self.shell("kill -9 $$")
        self.assertEqual(self.broker.read_message(2)[0].error, "signal 9")

    def test_failed_message_returns_after_its_backoff_or_the_retry_delay(self):
        self.broker.post("q", b"backoff", backoff="100")
        self.broker.post("q", b"default")
        self.shell("exit 1")
        self.broker.post("q", b"delay")
        self.shell("exit 1", "--retry-delay", "1000")
        delays = [self.broker.read_message(id)[0].delay for id in (1, 2, 3)]
        for delay, expected in zip(delays, (100, linger.FAILURE_DELAY, 1000)):
            self.assertTrue(expected - 2 <= delay <= expected, delays)

    def test_reject_on_failure_rejects_all_but_temporary_failures(self):
        for body in (b"0", b"1", b"75"):
            self.broker.post("q", body, dead="failed")
        self.shell("exit $(cat)", "--reject-on-failure", "-j", "2")
        self.assertEqual([m.body for m, _ in self.broker.list_messages("failed")], [b"1"])
        self.assertEqual([m.body for m, _ in self.broker.list_messages("q")], [b"75"])
        self.assertEqual(self.counts(), (0, 1, 0))

    def test_command_over_its_time_limit_is_killed_with_its_children(self):
        self.broker.post("q", b"x", dead="failed")
        pids = self.folder / "pids"
        script = f"trap '' TERM; sleep 60 & echo $! > {pids}; wait; sleep 60"
        with unittest.mock.patch.object(linger, "KILL_GRACE", 0.1):
            errors = self.shell(script, "--time-limit", "1", "--reject-on-failure")
        self.assertIn("message 1 of q: it took longer than 1 seconds\n", errors)
        self.assertEqual(self.counts(), (0, 1, 0))
        self.assertIn("longer than 1 seconds", self.broker.read_message(1)[0].error)
        until(lambda: not is_alive(int(pids.read_text())))

    def test_message_is_touched_while_its_command_runs(self):
        self.hasten(HEARTBEAT_INTERVAL=0.02, TOUCHES_PER_TIMEOUT=300)
        self.broker.post("q", b"x", timeout=30)
        done = self.folder / "done"

        def finish():
            try:
                pass_touches(self.broker)
            finally:
                done.touch()

        finished = self.thread(finish)
        self.assertEqual(self.shell(f"until [ -e {done} ]; do sleep 0.02; done"), "")
        finished.result()
        self.assertEqual(self.broker.counters["msg-timeouts"], 0)
        self.assertEqual(self.counts(), (0, 0, 0))

    def test_command_of_a_deleted_message_is_killed(self):
        self.hasten(HEARTBEAT_INTERVAL=0.02, TOUCHES_PER_TIMEOUT=300)
        self.broker.post("q", b"x", timeout=30)
        started = self.folder / "started"

        def delete():
            until(started.exists)
            self.broker.delete(1)

        deleted = self.thread(delete)
        errors = self.shell(f"touch {started}; exec sleep 60")
        deleted.result()
        self.assertIn(f"message 1 of q: {linger.LEASE_LOST}\n", errors)

    def test_no_use_of_its_streams_blocks_a_command(self):
        self.broker.post("q", b"x" * 256_000)
        errors = self.shell("exec <&-; head -c 3000000 /dev/zero | tr '\\0' '\\377' >&2; exit 1")
        self.assertGreater(len(errors), 3_000_000)
        error = self.broker.read_message(1)[0].error
        self.assertTrue(error.startswith("exit status 1: \ufffd\ufffd"), error)
        pid = self.folder / "pid"
        self.broker.post("q", b"left behind")
        self.shell(f"sleep 60 & echo $! > {pid}")
        self.assertEqual(self.broker.counters["msg-delete"], 1)
        os.kill(int(pid.read_text()), signal.SIGKILL)

    def test_command_that_cannot_start_for_want_of_something_uses_up_no_delivery(self):
        self.hasten(MIN_RETRY_DELAY=0.001)
        for error in (
            BlockingIOError(errno.EAGAIN, "no process"),
            OSError(errno.ENOMEM, "no memory"),
            OSError(errno.EMFILE, "no file"),
            MemoryError(),
        ):
            with self.subTest(error):
                self.broker.post("q", b"x", deliver=1, dead="failed")
                with self.failing_first(subprocess, "Popen", error, error):
                    errors = self.work("--once", "--", "true")
                self.assertRegex(
                    errors,
                    "^linger: cannot run true: no .*; trying again\n"
                    "linger: commands can be started again\n$",
                )
                self.assertEqual((self.counts(), self.counts("failed")), ((0, 0, 0), (0, 0, 0)))

    def failing_first(self, module, name, *errors):
        """Lets the first calls of a function fail with these errors."""
        function, errors = getattr(module, name), list(errors)

        def fail_first(*arguments, **options):
            if errors:
                raise errors.pop(0)
            return function(*arguments, **options)

        return unittest.mock.patch.object(module, name, fail_first)

    def test_input_of_a_command_needs_no_disk_where_there_are_files_in_memory(self):
        full = unittest.mock.Mock(side_effect=OSError(errno.ENOSPC, "no space"))
        self.broker.post("q", b"x" * 100_000)
        with unittest.mock.patch.object(linger.tempfile, "TemporaryFile", full):
            if hasattr(os, "memfd_create"):
                self.assertEqual(self.shell("[ $(wc -c) = 100000 ]"), "")

    def test_without_files_in_memory_it_waits_for_space_on_the_disk(self):
        self.hasten(MIN_RETRY_DELAY=0.001)
        errors = (OSError(errno.ENOSPC, "no space"), FileNotFoundError(errno.ENOENT, "no folder"))
        no_memory = unittest.mock.Mock(side_effect=PermissionError)
        self.broker.post("q", b"x" * 100_000, deliver=1)
        patch = unittest.mock.patch.object(os, "memfd_create", no_memory, create=True)
        with patch, self.failing_first(tempfile, "TemporaryFile", *errors):
            errors = self.shell("[ $(wc -c) = 100000 ]")
        self.assertTrue(errors.startswith("linger: cannot run sh: no space; trying again\n"))
        self.assertEqual(self.broker.counters["msg-delete"], 1)

    def test_command_that_cannot_start_for_want_of_a_thread_does_not_run(self):
        self.hasten(MIN_RETRY_DELAY=0.001)
        out = self.folder / "out"
        start, failing = threading.Thread.start, ["linger-stderr", "linger-timer"]

        def start_others(thread):
            if thread.name in failing:
                failing.remove(thread.name)
                raise RuntimeError("can't start new thread")
            start(thread)

        self.broker.post("q", b"x", deliver=1)
        with unittest.mock.patch.object(threading.Thread, "start", start_others):
            errors = self.shell(f"echo run >> {out}", "--time-limit", "60")
        self.assertIn("linger: cannot run sh: can't start new thread; trying again\n", errors)
        self.assertEqual((out.read_text(), failing), ("run\n", []))

    def test_worker_that_the_system_allows_too_few_threads_ends_and_says_so(self):
        start = threading.Thread.start
        for name in ("linger-worker-1", "linger-heartbeat"):
            with self.subTest(name):

                def start_others(thread, name=name):
                    if thread.name == name:
                        raise RuntimeError("can't start new thread")
                    start(thread)

                with unittest.mock.patch.object(threading.Thread, "start", start_others):
                    errors = self.work("-j", "2", "--", "true", status=2)
                self.assertRegex(errors, r"^linger: cannot run 2 commands .* new thread\n$")

    def test_verbose_writes_a_line_for_each_command(self):
        self.broker.post("q", b"0")
        self.broker.post("q", b"3")
        lines = self.shell("exit $(cat)", "-v").splitlines()
        self.assertRegex(lines[0], r"^linger: message 1 of q: done \([0-9.]+ s, delivery 1\)$")
        self.assertRegex(lines[1], r"^linger: message 2 of q: exit status 3 \(.* delivery 1\)$")

    def test_command_that_cannot_start_stops_the_worker_and_loses_nothing(self):
        script = self.folder / "script"
        script.write_text("#!/no/such/interpreter\n")
        script.chmod(0o755)
        for _ in range(3):
            self.broker.post("q", b"x")
        errors = self.work("--", str(script), status=2)
        self.assertRegex(errors, rf"^linger: cannot run {script}: .*\n$")
        self.assertEqual(self.counts(), (2, 1, 0))
        message = self.broker.read_message(1)[0]
        self.assertEqual((message.delivered, message.error[:10]), (0, "cannot run"))

    def test_count_is_exact(self):
        for _ in range(5):
            self.broker.post("q", b"x")
        self.work("-j", "2", "--count", "3", "--", "true")
        self.assertEqual(self.broker.counters["delivered"], 3)
        self.assertEqual(self.counts(), (2, 0, 0))

    def test_commands_run_at_the_same_time(self):
        for _ in range(2):
            self.broker.post("q", b"x")
        both = f"cd {self.folder}; touch $LINGER_MESSAGE_ID; until [ -e 1 -a -e 2 ]; do :; done"
        self.assertEqual(self.shell(both, "-j", "2", "--time-limit", "10"), "")
        self.assertEqual(self.counts(), (0, 0, 0))

    def test_successful_job_costs_one_request(self):
        for _ in range(5):
            self.broker.post("q", b"x")
        self.shell("true")
        self.assertEqual(self.broker.counters["msg-get"], 6)
        self.assertEqual(self.broker.counters["msg-delete"], 5)


class WorkProcessTest(CommandProcessCase):
    """Signals, restarts and sudden death of a worker, which need a process."""

    def setUp(self):
        super().setUp()
        self.started = self.folder / "started"
        self.go = self.folder / "go"

    def work(self, *arguments):
        # The script also ends when the test's directory is removed.
        going = f"[ -e {self.started} -a ! -e {self.go} ]"
        script = f"touch {self.started}; while {going}; do sleep 0.02; done"
        command = ("work", "q", *arguments, "--", "sh", "-c", script)
        return self.spawn(*command, stdout=subprocess.DEVNULL)

    def ended(self, process):
        """Waits for the end of a process; returns its exit status and errors."""
        _, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, errors

    def check_end_in_good_order(self, *signals):
        """Signals end a worker that runs a command and waits for another message."""

        def waiting():
            return self.client.info("q")["waiting"]

        self.client.post("q", "a")
        process = self.work("-j", "2")
        until(lambda: self.started.exists() and waiting() == 1)
        for number in signals:
            process.send_signal(number)
        until(lambda: waiting() == 0)
        self.client.post("q", "b")
        self.go.touch()
        self.assertEqual(self.ended(process), (0, ""))
        self.assertEqual(self.client.channel_stats("q"), {"ready": 1, "hidden": 0})

    def test_sigterm_lets_commands_finish_and_takes_no_new_message(self):
        self.check_end_in_good_order(signal.SIGTERM)

    def test_second_signal_kills_the_commands_and_releases_their_messages(self):
        self.client.post("q", "a", backoff="100")
        process = self.work()
        until(self.started.exists)

        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(self.ended(process), (0, f"linger: message 1 of q: {linger.STOPPED}\n"))
        message, state = self.client.read_message(1)
        self.assertEqual((message.error, state), (linger.STOPPED, "ready"))

    def test_sighup_lets_commands_finish_however_often_it_comes(self):
        self.check_end_in_good_order(signal.SIGHUP, signal.SIGTERM, signal.SIGHUP)

    def test_sighup_is_ignored_under_nohup(self):
        self.client.post("q", "a")
        command = ("work", "q", "--count", "2", "--", "touch", str(self.started))
        process = self.spawn(*command, first="trap '' HUP")
        until(self.started.exists)
        process.send_signal(signal.SIGHUP)
        self.client.post("q", "b")
        self.assertEqual(self.ended(process), (0, ""))
        self.assertEqual(self.client.stats()["msg-delete"], 2)

    @unittest.skipUnless(sys.platform == "linux", "the open files of a process are in /proc")
    def test_commands_have_standard_streams_when_the_worker_has_none(self):
        self.client.post("q", "a")
        streams = self.folder / "streams"
        look = f'cd /proc/$$/fd; found=$(readlink 0 1 2); echo "$found" > {streams}'
        script = f"{look}; echo lost; echo lost >&2; exit 3"
        command = ("work", "q", "--count", "1", "--", "sh", "-c", script)
        process = self.spawn(*command, first="exec <&- >&- 2>&-")
        self.assertEqual(process.wait(PATIENCE), 0)
        stdin, stdout, stderr = streams.read_text().splitlines()
        self.assertEqual((stdout, stderr[:5]), (os.devnull, "pipe:"))
        self.assertNotIn("socket", stdin)
        self.assertEqual(self.client.read_message(1)[0].error, "exit status 3: lost")

    def start_as_process_1(self, *options):
        """Starts a worker that runs each body as a script, as process 1 of a namespace."""
        init = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command = ["work", "q", *options, "--", "sh", "-c", 'eval "$(cat)"']
        worker = subprocess.Popen(
            [*init, sys.executable, "-S", compiled, *command],
            env={**os.environ, "LINGER_URL": self.url}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.addCleanup(worker.communicate)
        self.addCleanup(worker.kill)
        return worker

    @unittest.skipUnless(os.getuid() == 0 and shutil.which("unshare"), "needs root, and unshare")
    def test_worker_as_process_1_reaps_what_its_commands_leave_behind(self):
        """The third command looks for zombies; the exit statuses are those of the commands."""
        self.client.post_batch("q", ["sleep 0.01 & exit 3", "exit 4"], deliver=1, dead="failed")
        zombies = "grep -ls '^[0-9]* (sleep) Z' /proc/[0-9]*/stat"
        self.client.post("q", f"for n in $(seq 100); do {zombies} || exit 5; sleep 0.05; done")
        status, errors = self.ended(self.start_as_process_1("--count", "3"))
        self.assertEqual(status, 0)
        self.assertEqual(re.findall(r"(?m) ([0-9]+)$", errors), ["3", "4", "5"])

    @unittest.skipUnless(os.getuid() == 0 and shutil.which("unshare"), "needs root, and unshare")
    def test_worker_as_process_1_ends_on_sigterm(self):
        worker = self.start_as_process_1()
        until(lambda: self.client.info("q")["waiting"])
        find = ["ps", "-o", "pid=", "--ppid", str(worker.pid)]
        os.kill(int(subprocess.check_output(find)), signal.SIGTERM)
        self.assertEqual(self.ended(worker), (0, ""))

    def test_command_and_worker_survive_a_server_restart(self):
        self.serve_apart()
        self.client.post_batch("q", ["a", "b"])
        process = self.work("--count", "2")
        until(self.started.exists)
        self.server.end(signal.SIGKILL)
        self.go.touch()
        self.assertRegex(process.stderr.readline(), r"^linger: .*; trying again\n$")
        self.restart()
        self.assertEqual(self.ended(process), (0, f"linger: {linger.SERVER_IS_BACK}\n"))
        self.assertEqual(self.client.stats()["delivered"], 1)
        self.assertEqual(self.client.channel_stats("q"), {"ready": 0, "hidden": 0})

    def test_no_line_is_lost_when_worker_and_server_are_killed(self):
        self.serve_apart()
        count = int(os.environ.get("LINGER_TEST_LINES", "200"))
        patience = PATIENCE + count / 50
        lines = [f"line {n:09}\n" for n in range(count)]
        out = self.folder / "out"
        out.touch()

        def done():
            return out.stat().st_size // len(lines[0])

        script = f'read -r line; echo "$line" >> {out}'
        command = ("work", "q", "-j", "4", "--", "sh", "-c", script)
        posting = self.spawn("post", "q", "--lines", "--timeout", "2")
        worker = self.spawn(*command, stdout=subprocess.DEVNULL)
        posting.stdin.write("".join(lines[: count // 2]))
        posting.stdin.flush()
        until(lambda: done() >= count // 4, patience)
        worker.kill()
        self.server.end(signal.SIGKILL)
        feeding = self.thread(posting.communicate, "".join(lines[count // 2 :]), patience)
        self.restart()
        worker = self.spawn(*command, stdout=subprocess.DEVNULL)
        output, errors = feeding.result()
        self.assertEqual(output, f"{count}\n")
        self.assertRegex(errors, r"^(linger: .*; trying again for 30 s\n)*$")
        until(lambda: done() >= count * 3 // 4, patience)
        self.restart()
        until(
            lambda: done() >= count and not any(self.client.channel_stats("q").values()), patience
        )
        worker.kill()
        self.assertRegex(self.ended(worker)[1], r"^(linger: .*(; trying|responds) again\n)*$")
        written = out.read_text().splitlines(keepends=True)
        self.assertEqual(set(written), set(lines))
        repeated = len(written) - count  # in flight when the worker or a server was killed
        self.assertLessEqual(repeated, 16)


class BenchTest(CommandCase):
    NAMES = ("post", "get", "delete", "job", "ack-and-next", "batch of 100", "wake-up")

    def setUp(self):
        super().setUp()
        self.client = linger.Client(self.server.url)
        self.addCleanup(self.client.close)

    def bench(self, *arguments, **options):
        return self.run_command("bench", "--seconds", "0.02", "--json", *arguments, **options)

    def test_bench_measures_a_temporary_server_and_removes_it(self):
        folder = ("--folder", self.folder)
        status, output, errors = self.bench(*folder, "--connections", 2, "--sync", "off")
        self.assertEqual((status, errors), (0, ""))
        record = json.loads(output)
        measured = {m["measurement"]: m for m in record["measurements"]}
        self.assertEqual(list(measured), ["disk sync", *self.NAMES])
        for m in measured.values():
            self.assertGreater(m["count"], 0, m)
            self.assertTrue(0 < m["p50-ms"] <= m["p99-ms"], m)
        self.assertEqual((record["sync"], record["connections"], record["bytes"]), ("off", 2, 100))
        self.assertNotEqual(record["url"], self.server.url)
        with self.assertRaisesRegex(linger.Unavailable, "cannot connect"):
            linger.Client(record["url"]).server_info()
        self.assertEqual(list(self.folder.glob("linger-bench-*")), [])
        self.assertEqual(self.client.stats()["msg-add"], 0)

    def test_a_measurement_says_how_much_of_it_the_syncs_of_the_disk_are(self):
        times = {"disk sync": 0.2, "get": 0.3, "post": 0.8, "job": 1.6, "delete": 0.1}
        for sync, expected in (("full", [100, 0, 25, 25, 100]), ("normal", [None] * 5)):
            records = [{"measurement": name, "p50-ms": time} for name, time in times.items()]
            linger._add_sync_percent(records, sync)
            self.assertEqual([record["sync-percent"] for record in records], expected)

    def test_bench_measures_the_server_at_a_url_and_deletes_its_messages(self):
        self.client.post("jobs", "not to be touched")
        status, output, errors = self.bench(self.server.url)
        self.assertEqual((status, errors), (0, ""))
        record = json.loads(output)
        self.assertEqual(tuple(m["measurement"] for m in record["measurements"]), self.NAMES)
        self.assertEqual({m["sync-percent"] for m in record["measurements"]}, {None})
        self.assertGreater(self.client.stats()["msg-add"], 100)
        self.assertEqual(self.client.stats()["current-messages"], 1)
        self.assertEqual(self.client.channel_stats("jobs")["ready"], 1)

    def test_bench_ignores_the_url_in_the_environment(self):
        arguments = ("bench", self.server.url, "--seconds", "0.02")
        self.assertEqual(run_command("not a URL", *arguments)[::2], (0, ""))
        self.assertIn("LINGER_URL is not", self.linger("help", "bench"))

    def test_terminal_shows_a_table_and_the_progress(self):
        arguments = ("bench", self.server.url, "--seconds", "0.02")
        _, output, errors = self.run_command(*arguments, terminal=True)
        lines = output.decode().splitlines()
        self.assertRegex(lines[0], r"measurement +per-second +p50-ms +p99-ms +sync-percent")
        self.assertRegex(lines[-1], r"wake-up +- +[0-9.]+ +[0-9.]+")
        self.assertIn("\rack-and-next ...", errors)
        self.assertTrue(errors.endswith("\r\x1b[K"))

    def test_bench_failure_is_one_line(self):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for arguments, reason in (
            ((nobody,), "cannot connect"),
            ((self.server.url, "--sync", "off"), "temporary"),
            (("--folder", self.folder / "none"), "none"),
            (("--seconds", "nan"), "from 0.01"),
        ):
            with self.subTest(reason):
                self.assertIn(reason, self.refused("bench", "--seconds", "0.02", *arguments))

    def test_temporary_server_that_does_not_start_reports_why(self):
        with unittest.mock.patch.object(linger, "SYNC_LEVELS", ("hard",)):
            errors = self.refused("bench", "--seconds", "0.02", "--folder", self.folder)
        self.assertIn("the server does not start: --sync must be one of full", errors)
        self.assertEqual(list(self.folder.glob("linger-bench-*")), [])


class FullBenchTest(CommandCase):
    options = types.MappingProxyType({"hlm": 2})

    def test_refused_request_ends_bench_and_is_reported(self):
        self.assertIn("high-level mark", self.refused("bench", self.server.url))
        self.assertEqual(self.broker.stats()["current-messages"], 0)


class TokenBenchTest(CommandCase):
    options = types.MappingProxyType({"token": "T0ken"})

    def test_bench_needs_a_token_if_the_server_does(self):
        bench = ("bench", self.server.url, "--seconds", "0.02")
        self.assertIn("linger: ", self.refused(*bench))
        self.assertIn("linger: ", self.refused(*bench, "--token", "wrong"))
        self.assertEqual(self.linger(*bench, "--token", "T0ken").count("\n"), 7)


class BenchProcessTest(CommandProcessCase):
    def test_interrupt_leaves_no_message(self):
        process = self.spawn("bench", self.url, "--seconds", "60", "--connections", "32")
        until(lambda: self.client.stats()["msg-add"] > 100)
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.communicate(timeout=PATIENCE), ("", ""))
        self.assertEqual(self.client.stats()["current-messages"], 0)

    def test_interrupt_leaves_no_server_and_no_file(self):
        arguments = ("bench", "--seconds", "60", "--folder", str(self.folder))
        code = "import linger, sys; linger.DISK_TEST_SECONDS = 0.1; sys.exit(linger.main())"
        folder = os.path.dirname(compiled)
        process = self.spawn(*arguments, program=("-c", code), cwd=folder, start_new_session=True)
        logs = "linger-bench-*/linger.db-wal"
        until(lambda: any(log.stat().st_size > 300_000 for log in self.folder.glob(logs)))
        table = subprocess.run(["ps", "-A", "-o", "ppid=,pid="], capture_output=True, text=True)
        pairs = [line.split() for line in table.stdout.splitlines()]
        (server,) = (int(pid) for parent, pid in pairs if parent == str(process.pid))
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C at a terminal does
        self.assertEqual(process.communicate(timeout=PATIENCE), ("", ""))
        self.assertEqual(process.returncode, 128 + signal.SIGINT)
        self.assertFalse(is_alive(server))
        self.assertEqual(list(self.folder.glob("linger-bench-*")), [])


# Records, in order, each write to SQLite's log, each sync of it, and each response sent.
TRACED = r'''
import _sqlite3, ctypes, linger, os, socket, sys


class Vfs(ctypes.Structure):
    """SQLite's sqlite3_vfs up to xOpen (sqlite.org/c3ref/vfs.html)."""

    OPEN = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_int, ctypes.c_void_p)
    OPEN_WAL = 0x80000  # SQLITE_OPEN_WAL
    _fields_ = [("numbers", ctypes.c_int * 3)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("next", "name", "data", "open")]


class FileMethods(ctypes.Structure):
    """SQLite's sqlite3_io_methods (sqlite.org/c3ref/io_methods.html)."""

    WRITE = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    )
    SYNC = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    _fields_ = [("version", ctypes.c_int)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("close", "read", "write", "truncate", "sync")]
    _fields_ += [("others", ctypes.c_void_p * 13)]


class Trace:
    """Puts itself between SQLite and its file system, in the process that it traces."""

    def __init__(self, path):
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.kept = []  # what SQLite holds pointers to
        find = ctypes.CDLL(getattr(_sqlite3, "__file__", None)).sqlite3_vfs_find
        find.restype = ctypes.POINTER(Vfs)
        self.vfs = find(None).contents
        self.open_file = Vfs.OPEN(self.vfs.open)
        self.vfs.open = self.pointer(Vfs.OPEN(self.open))
        for name in ("send", "sendall", "sendmsg"):
            setattr(socket.socket, name, self.sender(getattr(socket.socket, name)))

    def record(self, event):
        os.write(self.file, event.encode() + b"\n")

    def pointer(self, function):
        self.kept.append(function)
        return ctypes.cast(function, ctypes.c_void_p).value

    def open(self, vfs, name, file, flags, flags_out):
        status = self.open_file(vfs, name, file, flags, flags_out)
        if status == 0 and flags & Vfs.OPEN_WAL:
            methods = ctypes.c_void_p.from_address(file)  # the first member of a sqlite3_file
            methods.value = self.traced(methods.value)
        return status

    def traced(self, address):
        """The address of a file's methods that record what is written and synced."""
        methods = FileMethods.from_buffer_copy(FileMethods.from_address(address))
        write, sync = methods.WRITE(methods.write), methods.SYNC(methods.sync)

        def traced_write(file, data, size, offset):
            self.record("write")
            return write(file, data, size, offset)

        def traced_sync(file, flags):
            status = sync(file, flags)
            self.record("sync" if status == 0 else "failed sync")
            return status

        methods.write = self.pointer(methods.WRITE(traced_write))
        methods.sync = self.pointer(methods.SYNC(traced_sync))
        self.kept.append(methods)
        return ctypes.addressof(methods)

    def sender(self, send):
        def traced_send(connection, data, *arguments):
            head = bytes(data[0] if isinstance(data, (list, tuple)) else data)[:12]
            if head.startswith(b"HTTP/1.1 "):
                self.record(f"send {head[9:].decode()}")
            return send(connection, data, *arguments)

        return traced_send


Trace(sys.argv.pop(1))
linger.main()
'''


class SyncTest(ProcessCase):
    """What a response promises is synced before the response is sent."""

    CHANGES = (
        ("POST", "/channels/q", 202),
        ("GET", "/channels/q?auto", 200),
        ("POST", "/channels/q", 202),
        ("DELETE", "/messages/2", 204),
        ("POST", "/channels/q/batch", 202),
        ("GET", "/channels/q?ack=3&nowait", 200),
        ("POST", "/messages/4/release", 204),
        ("PUT", "/channels/q/topics/t", 204),
        ("POST", "/topics/t", 202),
        ("PUT", "/channels/q/settings?timeout=60", 204),
        ("DELETE", "/channels/q", 204),
    )

    def start_traced(self, *arguments):
        self.trace = self.folder / "trace"
        server = self.start(
            *arguments,
            program=("-c", TRACED, str(self.trace)),
            environment={"PYTHONPATH": os.path.dirname(compiled)},
        )
        if not server.line:
            _, errors = server.end()
            self.assertIn("sqlite3_vfs_find", errors)
            self.skipTest("this Python's SQLite shows no sqlite3_vfs_find")
        return server

    def changes(self, server):
        """Makes each call, one after the other; the events of each, as words."""
        end = self.trace.stat().st_size
        for method, path, expected in self.CHANGES:
            body = b"x\ny" if method == "POST" else None
            headers = {"Content-Type": "application/x-ndjson"} if path.endswith("/batch") else None
            if headers:
                body = b'{"body": "x"}\n{"body": "y"}\n'
            status, _, answer = server.call(method, path, body, headers)
            self.assertEqual(status, expected, (method, path, answer))
            start, end = end, self.trace.stat().st_size
            yield f"{method} {path}", self.trace.read_text()[start:end].replace("\n", " ")

    def test_a_response_is_sent_after_a_sync_of_all_that_was_written(self):
        for call, events in self.changes(self.start_traced("--sync=full")):
            with self.subTest(call):
                self.assertRegex(events, r"^(write |sync )*write sync send 20[024] $")

    def test_a_consumer_that_waits_gets_its_message_after_a_sync_too(self):
        server = self.start_traced("--sync=full")
        waiting = self.thread(server.call, "GET", "/channels/q?auto")
        until(lambda: b'"q"' in server.call("GET", "/channels")[2])
        start = self.trace.stat().st_size
        self.assertEqual(server.call("POST", "/channels/q", b"x")[0], 202)
        self.assertEqual(waiting.result(PATIENCE)[0], 200)
        events = self.trace.read_text()[start:].replace("\n", " ")
        self.assertRegex(events, r"^((write |sync )*write sync (send 20[02] )+)+$")
        self.assertEqual(events.count("send"), 2)

    def test_only_a_plain_take_of_a_message_without_a_limit_is_not_synced(self):
        server = self.start_traced("--sync=full")
        for query in ("", "?deliver=9", ""):
            self.assertEqual(server.call("POST", f"/channels/q{query}", b"x")[0], 202)
        for pattern in (r"(write )+", r"(write )+sync ", r"(write )+"):
            start = self.trace.stat().st_size
            self.assertEqual(server.call("GET", "/channels/q?nowait")[0], 200)
            events = self.trace.read_text()[start:].replace("\n", " ")
            self.assertRegex(events, f"^{pattern}send 200 $")
        self.assertEqual(server.call("DELETE", "/messages/1")[0], 204)

    def test_a_server_that_is_told_to_sync_less_does(self):
        """Thus the tests above see the difference."""
        for level, pattern in (("normal", "^.*write send 20. $"), ("off", "^(write )+send 20. $")):
            server = self.start_traced(f"--sync={level}", f"--dbfile={self.folder / level}.db")
            for call, events in self.changes(server):
                with self.subTest(level, call=call):
                    self.assertRegex(events, pattern)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = os.environ.get("CHROMEDRIVER", shutil.which("chromedriver"))  # "": no such tests


class Browser:
    """A headless Chromium, driven by WebDriver (w3.org/TR/webdriver2)."""

    OPTIONS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--host-resolver-rules=MAP *.example 127.0.0.1",
        "--disable-features=BackForwardCache",
    )  # fmt: skip

    def __init__(self, folder):
        """Starts it with an empty profile in a folder."""
        self.driver = subprocess.Popen(
            [CHROMEDRIVER, "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HOME": str(folder)},
        )
        try:
            line = next(line for line in self.driver.stdout if "successfully on port" in line)
            port = int(re.findall("[0-9]+", line)[-1])
            self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=3 * PATIENCE)
            options = {"binary": CHROMIUM, "args": [*self.OPTIONS, f"--user-data-dir={folder}/it"]}
            self.path = "/session"
            session = self.call("POST", "", {
                "capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}
            })  # fmt: skip
            self.path += "/" + session["sessionId"]
        except BaseException:
            self.end_driver()
            raise

    def call(self, method, path, body=None):
        """Makes a call of the session; its value, or an `AssertionError` with what went wrong."""
        self.http.request(method, self.path + path, None if body is None else json.dumps(body))
        value = json.loads(self.http.getresponse().read())["value"]
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{value['error']}: {value['message'].splitlines()[0]}")
        return value

    def open(self, url):
        self.call("POST", "/url", {"url": url})

    def run(self, script, *arguments):
        """The value, or that of the promise, which the body of a JavaScript function returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": arguments})

    def press(self, *keys):
        """Presses keys one after the other, by their codes (w3.org/TR/webdriver2, 17.4.2)."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        source = {"type": "key", "id": "keys", "actions": steps}
        self.call("POST", "/actions", {"actions": [source]})

    def command(self, name, **parameters):
        """A command of Chromium's DevTools."""
        return self.call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def resize(self, width, height):
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=width < 600)  # fmt: skip

    def set_theme(self, theme):
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.command("Emulation.setEmulatedMedia", features=[feature])

    def log(self):
        """What pages have logged since the last call."""
        return self.call("POST", "/se/log", {"type": "browser"})

    def picture(self):
        return base64.b64decode(self.call("GET", "/screenshot"))

    def close(self):
        try:
            self.call("DELETE", "")
        finally:
            self.http.close()
            self.end_driver()

    def end_driver(self):
        self.driver.terminate()
        self.driver.communicate(timeout=PATIENCE)


@functools.lru_cache(None)
def shared_browser():
    """The browser of all tests, which is started for the first that needs it."""
    folder = tempfile.mkdtemp(prefix="linger-test-")
    unittest.addModuleCleanup(shutil.rmtree, folder, ignore_errors=True)
    browser = Browser(folder)
    unittest.addModuleCleanup(browser.close)
    return browser


class Pages(http.server.BaseHTTPRequestHandler):
    """Answers with an empty page, and with the header that its query names."""

    def do_GET(self):
        header = {
            "": ("Referrer-Policy", "unsafe-url"),
            "no-referrer": ("Referrer-Policy", "no-referrer"),
            "sandbox": ("Content-Security-Policy", "sandbox allow-scripts allow-forms"),
        }[self.path.partition("?")[2]]
        self.send_response(200)
        self.send_header(*header)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!DOCTYPE html><title>Foreign</title><body>")

    def log_message(self, *arguments):
        pass


# What pages can make a browser send without asking anybody: each is called with a URL, and returns
# an element or a promise.  Most read, which takes a message; those of WRITES post one.
ATTACKS = """
function element(name, attributes) {
    return Object.assign(document.createElement(name), attributes);
}
function form(url, method) {
    const name = "frame" + Math.random();
    const frame = element("iframe", {name});
    const form = element("form", {method, action: url, target: name});
    form.append(element("input", {name: "nowait", value: ""}));
    document.body.append(frame, form);
    return new Promise(done => { frame.onload = done; form.submit(); });
}
const attacks = {
    image: url => element("img", {src: url}),
    script: url => element("script", {src: url}),
    module: url => element("script", {type: "module", src: url}),
    stylesheet: url => element("link", {rel: "stylesheet", href: url}),
    preload: url => element("link", {rel: "preload", as: "image", href: url}),
    frame: url => element("iframe", {src: url}),
    object: url => element("object", {data: url}),
    video: url => element("video", {src: url}),
    audio: url => element("audio", {src: url}),
    font: url => new FontFace("f" + Math.random(), `url(${url})`).load(),
    events: url => new Promise(done => {
        const source = new EventSource(url);
        source.onerror = () => { source.close(); done(); };
    }),
    fetch: url => fetch(url, {mode: "no-cors"}),
    credentials: url => fetch(url, {mode: "no-cors", credentials: "include"}),
    cors: url => fetch(url),
    form: url => form(url, "GET"),
    "POST form": url => form(url, "POST"),
    "POST fetch": url => fetch(url, {mode: "no-cors", method: "POST", body: "x"}),
    "POST cors": url => fetch(url, {method: "POST", body: "x"}),
    "DELETE": url => fetch(url, {method: "DELETE"}),
};
async function attack(kind, url) {
    const made = attacks[kind](url);
    const ended = made instanceof Promise ? made.catch(() => 0) : new Promise(done => {
        made.onload = made.onerror = done;
        document.body.append(made);
    });
    return Promise.race([ended, new Promise(done => setTimeout(done, 5000))]);
}
function attackAll(list) {
    return Promise.all(list.map(([kind, url]) => attack(kind, url))).then(() => 0);
}
"""


@unittest.skipUnless(CHROMIUM and CHROMEDRIVER, "needs chromium and chromedriver")
class BrowserTest(ProcessCase):
    """What pages can do with a server on loopback, in a real browser."""

    HOSTS = ("127.0.0.1", "localhost", "x.localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "b.example")

    @classmethod
    def setUpClass(cls):
        cls.browser = shared_browser()
        pages = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
        cls.addClassCleanup(pages.server_close)
        cls.pages = pages.server_port
        thread = threading.Thread(target=pages.serve_forever, args=(0.01,))
        thread.start()
        cls.addClassCleanup(thread.join)
        cls.addClassCleanup(pages.shutdown)

    def page(self, host, header=""):
        return f"http://{host}:{self.pages}/?{header}"

    def changed(self, server):
        """The channels that do not have the one message that was posted to each of them."""
        names = json.loads(server.call("GET", "/channels")[2])["channels"]
        stats = {
            name: json.loads(server.call("GET", f"/channels/{urllib.parse.quote(name)}/stats")[2])
            for name in names
        }
        return [name for name in names if stats[name] != {"ready": 1, "hidden": 0}]

    def attack(self, page):
        """Lets a page do all that it can; the channels that this changed or did not refuse."""
        with open(self.folder / "log", "w+") as log:
            server = self.start("--log-requests", "--dbfile=:memory:", errors=log)
            self.browser.open(page)
            urls = {}
            for kind in self.browser.run(ATTACKS + "return Object.keys(attacks)"):
                for host in self.HOSTS:
                    channel = f"{kind} to {host}"
                    path = "/channels/" + urllib.parse.quote(channel)
                    self.assertEqual(server.call("POST", path, "x")[0], 202)
                    query = "" if kind.startswith("POST") else "?nowait"
                    urls[channel] = (kind, f"http://{host}:{server.port}{path}{query}")
            self.browser.run(ATTACKS + "return attackAll(arguments[0])", list(urls.values()))
            changed = self.changed(server)
            server.end()
            log.seek(0)
            refused = re.findall(r"(?:GET|POST|OPTIONS) /channels/([^ ?]+)\S* 403 ", log.read())
        return changed, urls.keys() - map(urllib.parse.unquote, refused)

    def test_an_event_source_connects_again(self):
        server = self.start("--dbfile=:memory:")
        url = f"http://127.0.0.1:{server.port}"
        self.browser.open(f"{url}/health")
        self.browser.run("""
            window.seen = [];
            const source = new EventSource("/channels/q/live");
            source.onmessage = ({data}) => seen.push(JSON.parse(data).body);
            return new Promise((resolve) => { source.onopen = () => resolve(true); });
        """)
        server.call("POST", "/channels/q", "before")
        until(lambda: self.browser.run("return seen") == ["before"])
        server.end()
        server = self.start("--dbfile=:memory:", f"--port={server.port}")
        until(lambda: server.call("POST", "/channels/q", "after")
              and self.browser.run("return seen.includes('after')"))  # fmt: skip

    def test_no_page_of_another_origin_takes_or_posts_a_message(self):
        for page in (
            self.page("a.example"),
            self.page("a.example", "no-referrer"),
            self.page("a.example", "sandbox"),
            self.page("127.0.0.1", "no-referrer"),  # another origin of the same site
        ):
            with self.subTest(page):
                changed, not_refused = self.attack(page)
                self.assertEqual(changed, [])
                self.assertEqual(not_refused, set())  # each attack has reached the server

    def test_no_page_takes_a_message_by_sending_its_reader_there(self):
        server = self.start("--dbfile=:memory:")
        for host in self.HOSTS:
            with self.subTest(host):
                self.assertEqual(server.call("POST", f"/channels/{host}", "x")[0], 202)
                self.browser.open(self.page("a.example", "no-referrer"))
                url = f"http://{host}:{server.port}/channels/{host}?nowait"
                self.browser.run("location = arguments[0]", url)
                state = "return document.readyState + document.title"
                until(lambda state=state: self.browser.run(state) == "complete")
        self.assertEqual(self.changed(server), [])

    def test_a_page_of_the_server_itself_posts_and_takes(self):
        server = self.start("--dbfile=:memory:")
        for host in ("127.0.0.1", "localhost", "x.localhost"):
            with self.subTest(host):
                self.browser.open(f"http://{host}:{server.port}/health")
                script = """
                    return fetch("/channels/q", {method: "POST", body: "x"})
                        .then(posted => fetch("/channels/q?auto&nowait"))
                        .then(taken => taken.text())
                """
                self.assertEqual(self.browser.run(script), "x")

    def test_a_page_of_an_allowed_origin_posts_and_takes(self):
        origin = f"http://a.example:{self.pages}"
        server = self.start("--dbfile=:memory:", f"--cors={origin}")
        script = """
            return fetch(arguments[0], {method: "POST", body: "x"})
                .then(posted => fetch(arguments[0] + "?auto&nowait"))
                .then(taken => taken.text())
                .catch(error => "refused")
        """
        for host, expected in (("a.example", "x"), ("b.example", "refused")):
            with self.subTest(host):
                self.browser.open(self.page(host))
                url = f"http://127.0.0.1:{server.port}/channels/q"
                self.assertEqual(self.browser.run(script, url), expected)


SCREENS = HERE / ".screens"  # what the dashboard looked like in the last run of its tests
AXE = os.environ.get("AXE", "")  # the path of axe.min.js, from the npm package axe-core


class DocumentTest(ServerTest):
    """The dashboard's document and the calls that were made for it, without a browser."""

    def get(self, accept=PageTest.PAGE, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.call("GET", "/", None, {"Host": "localhost", "Accept": accept, **headers})

    def test_who_prefers_html_gets_the_page_and_everybody_else_json(self):
        for accept, kind in (
            (PageTest.PAGE, "text/html"),
            ("text/html", "text/html"),
            ("TEXT/HTML; q=0.3, */*;q=0.2", "text/html"),
            ("*/*", "application/json"),
            ("", "application/json"),
            ("text/*", "application/json"),
            ("text/html, application/json", "application/json"),
            ("text/html;q=0, */*", "application/json"),
            ("text/html;q=nan, */*;q=0", "application/json"),
            ("application/json, text/html;q=0.9", "application/json"),
        ):
            with self.subTest(accept):
                status, headers, body = self.get(accept)
                self.assertEqual((status, headers["Vary"]), (200, "Accept"))
                self.assertEqual(headers["Content-Type"].partition(";")[0], kind)
                self.assertEqual(body[:15] == b"<!DOCTYPE html>", kind == "text/html")

    def test_it_is_small_and_allows_no_script_and_no_host_but_its_own(self):
        _, headers, body = self.get()
        self.assertLess(len(body), 60_000)
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        for kind in ("script", "style"):
            (text,) = re.findall(f"<{kind}>(.*?)</{kind}>".encode(), body, re.S)
            digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
            self.assertEqual(policy[f"{kind}-src"], f"'sha256-{digest}'")
        self.assertEqual(policy["default-src"], "'none'")
        self.assertEqual(policy["frame-ancestors"], "'none'")
        self.assertEqual(policy["connect-src"], "'self'")
        self.assertNotRegex(body.decode(), r"https?://(?!www\.w3\.org/2000/svg)")
        self.assertNotRegex(body.decode(), "innerHTML|insertAdjacentHTML|document.write|eval")
        self.assertEqual(headers["X-Content-Type-Options"], "nosniff")

    def test_it_is_sent_once_and_then_only_compared(self):
        etag = self.get()[1]["ETag"]
        status, headers, body = self.get(If_None_Match=etag)
        self.assertEqual((status, headers["ETag"], body), (304, etag, b""))
        self.assertIsNone(headers["Content-Length"])
        self.assertEqual(self.get(If_None_Match='"other"')[0], 200)

    def test_head_answers_like_get(self):
        status, headers, body = self.call("HEAD", "/", None, {"Accept": "text/html"})
        self.assertEqual((status, body), (200, b""))
        self.assertEqual(int(headers["Content-Length"]), len(linger.page().body))

    def test_a_link_on_another_site_leads_to_it_but_not_by_a_foreign_name(self):
        foreign = {"Sec_Fetch_Site": "cross-site", "Referer": "https://wiki.example/"}
        self.assertEqual(self.get(**foreign)[0], 200)
        self.assertEqual(self.get("*/*", **foreign)[0], 403)
        self.assertEqual(self.get(Host="evil.example")[0], 403)

    def test_the_history_of_dead_letters_is_listed_over_all_channels(self):
        for n, (channel, reason) in enumerate((("a", "x"), ("b", "y"), ("a", "z")), 1):
            self.broker.post(channel, b"%d" % n, dead="failed")
            self.broker.reject(n, reason=reason)
        self.broker.post("c", b"4", dead="late", deliver=1)
        self.broker.get("c")
        self.broker.release(4)
        self.broker.post("c", b"no dead letter")

        def listed(query=""):
            status, messages = self.json("GET", f"/dead-letters{query}")
            self.assertEqual(status, 200)
            return [message["id"] for message in messages]

        self.assertEqual(listed(), [4, 3, 2, 1])
        self.assertEqual(listed("?order=oldest&n=2"), [1, 2])
        self.assertEqual(listed("?order=oldest&n=2&after=2"), [3, 4])
        self.assertEqual(listed("?n=2&after=4"), [3, 2])
        self.assertEqual(listed("?reason=deliver"), [4])
        self.assertEqual(self.json("GET", "/dead-letters")[1][1]["error"], "z")
        for query in ("?reason=odd", "?order=odd", "?n=0", "?after=x"):
            self.assertEqual(self.json("GET", f"/dead-letters{query}")[0], 400)

    def test_info_counts_what_has_happened_in_the_channel(self):
        for _ in range(3):
            self.broker.post("q", b"x")
        self.broker.delete(self.broker.get("q").id)
        self.broker.release(self.broker.get("q").id)
        expected = {"posted": 3, "delivered": 2, "deleted": 1, "failed": 1}
        self.assertEqual(self.broker.info("q")["events"], expected)
        self.assertEqual(self.broker.info("other")["events"], dict.fromkeys(expected, 0))

    def test_stats_say_who_is_connected_and_what_is_free(self):
        self.park("q")
        stats = self.json("GET", "/stats")[1]
        self.assertEqual((stats["current-connections"], stats["current-waiting"]), (2, 1))
        self.assertEqual(stats["db-free"], -1)  # in memory


class DocumentTokenTest(ServerTest):
    def setUp(self):
        with tempfile.NamedTemporaryFile("w", prefix="linger-test-", delete=False) as file:
            file.write("a b0ss read,write,admin\nb r3ad read\nc j0bs write,admin jobs*\n")
        self.addCleanup(os.unlink, file.name)
        self.options = {"tokens": file.name}
        super().setUp()

    def test_the_page_needs_no_token_and_its_calls_do(self):
        self.assertEqual(self.call("GET", "/", None, {"Accept": "text/html"})[0], 200)
        for path in ("/", "/access", "/stats", "/channels", "/dead-letters"):
            self.assertEqual(self.call("GET", path)[0], 401)

    def test_a_script_is_not_answered_with_a_challenge_for_which_a_browser_asks(self):
        headers = {"X-Requested-With": "Linger"}
        _, answer, _ = self.call("GET", "/access", None, headers)
        self.assertEqual(answer.get_all("WWW-Authenticate"), ['Bearer realm="Linger"'])
        self.assertEqual(len(self.call("GET", "/access")[1].get_all("WWW-Authenticate")), 2)

    def test_access_tells_the_rights_of_a_token(self):
        for token, rights, restricted in (
            ("b0ss", ["read", "write", "admin", "metrics"], False),
            ("r3ad", ["read"], False),
            ("j0bs", ["write", "admin", "metrics"], True),
        ):
            expected = (200, {"rights": rights, "restricted": restricted})
            self.assertEqual(self.json("GET", "/access", None, bearer(token)), expected)

    def test_dead_letters_of_all_channels_are_for_those_who_manage_the_server(self):
        for token, status in (("b0ss", 200), ("r3ad", 403), ("j0bs", 403)):
            self.assertEqual(self.call("GET", "/dead-letters", None, bearer(token))[0], status)


# What a user does with the page, and what is seen on it: returned at once, or when it is expected.
HANDS = """
const scope = () => document.querySelector("dialog[open]") || document.body;
const seen = element => element.checkVisibility();
const input = label => [...scope().querySelectorAll("input, textarea, select")].filter(seen).find(
    field => (field.closest("label")?.firstChild.textContent || field.ariaLabel) === label);
const table = label => [...document.querySelectorAll("table")].find(
    table => table.ariaLabel === label && seen(table));
const hands = {
    click(text) {
        const found = [...scope().querySelectorAll("button, a, summary, input")].filter(seen).find(
            element => (element.ariaLabel || element.textContent.trim()
                || element.closest("label")?.firstChild.textContent) === text);
        if (!found || found.disabled) {
            return false;
        }
        found.click();
        return true;
    },
    fill(label, value) {
        const field = input(label);
        if (field) {
            field.value = value;
            field.dispatchEvent(new Event("input", {bubbles: true}));
            field.dispatchEvent(new Event("change", {bubbles: true}));
        }
        return Boolean(field);
    },
    rows(label) {
        const rows = table(label)?.tBodies[0].rows || [];
        return [...rows].map(row => [...row.cells].map(
            cell => cell.innerText.trim().replace(/\\s+/g, " ")));
    },
    cell: (label, row, column) => hands.rows(label)[row]?.[column],
    column: (label, number) => hands.rows(label).map(row => row[number]),
    value(name) {
        const terms = [...document.querySelectorAll("dt")];
        return terms.find(term => term.textContent === name)?.nextSibling.textContent;
    },
    buttons: () => [...scope().querySelectorAll("header button, main button, dialog button")]
        .filter(seen).map(button => button.textContent),
    tools: () => [...document.querySelectorAll(".head button")].map(button => button.textContent),
    text: () => document.body.innerText,
    body: () => document.querySelector("pre.body")?.textContent,
    heading: () => document.querySelector("h1").textContent,
    problem: () => document.getElementById("problem").textContent,
    toast: () => document.getElementById("toast").textContent,
    light: () => document.getElementById("light").textContent,
    wrong: () => document.querySelector("dialog[open] .wrong, form .wrong")?.textContent,
};
const [expected, patience, what, ...given] = arguments;
const isExpected = seen => expected === true ? seen
    : expected?.pattern ? new RegExp(expected.pattern).test(seen ?? "")
    : JSON.stringify(seen) === JSON.stringify(expected);
return new Promise(done => {
    let seen = null;
    const look = () => {
        seen = hands[what](...given) ?? null;
        if (!patience || isExpected(seen)) {
            end();
        }
    };
    const observer = new MutationObserver(look);
    const timer = setTimeout(() => end(), 1000 * patience);
    const end = () => {
        observer.disconnect();
        clearTimeout(timer);
        done(seen);
    };
    observer.observe(document, {
        subtree: true, childList: true, attributes: true, characterData: true,
    });
    look();
});
"""

# Lets the pauses between two looks of the page at the server be shorter than they are.
HURRY = """
const wait = window.setTimeout;
window.setTimeout = (work, time) => wait(work, time > 5000 ? time : time / 10);
"""


# Presses a key on the first chart; what its tooltip then says.
KEY = """
const chart = document.querySelector(".chart");
chart?.dispatchEvent(new KeyboardEvent("keydown", {key: arguments[0]}));
return chart?.querySelector(".tip").textContent;
"""


@unittest.skipUnless(CHROMIUM and CHROMEDRIVER, "needs chromium and chromedriver")
class DashboardCase(Folder):
    """A server in this process, and its dashboard in a real browser."""

    @classmethod
    def setUpClass(cls):
        cls.browser = shared_browser()
        cls.browser.log()  # of other tests
        cls.addClassCleanup(cls.browser.open, "about:blank")
        added = cls.browser.command("Page.addScriptToEvaluateOnNewDocument", source=HURRY)
        remove = "Page.removeScriptToEvaluateOnNewDocument"
        cls.addClassCleanup(cls.browser.command, remove, **added)

    def tearDown(self):
        """The page has failed nowhere, and kept to its policy."""
        bad = [entry["message"] for entry in self.browser.log() if entry["source"] != "network"]
        self.assertEqual(bad, [])
        super().tearDown()

    def serve(self, **options):
        server = linger.serve(**{"dbfile": ":memory:", **options})
        self.addCleanup(server.close)
        return server

    def open(self, path="", **options):
        """The broker of a new server, of which a view is shown."""
        self.server = self.serve(**options)
        self.browser.open(f"{self.server.url}/#/{path}")
        return self.server.broker

    def until(self, claim):
        """Waits for a claim, and leaves the processor to the browser meanwhile."""
        until(lambda: claim() or select.select([], [], [], 0.01)[0])

    def see(self, what, *arguments):
        return self.browser.run(HANDS, None, 0, what, *arguments)

    def await_seen(self, expected, what, *arguments):
        """Waits until what is seen is what is expected, or matches it, or is true."""
        wanted = expected
        if isinstance(expected, re.Pattern):
            wanted = {"pattern": expected.pattern}
        seen, deadline = None, time.monotonic() + PATIENCE
        while (left := deadline - time.monotonic()) > 0:
            try:
                seen = self.browser.run(HANDS, wanted, left, what, *arguments)
            except AssertionError as error:  # the page is loaded anew
                if "unload" not in str(error):
                    raise
                continue
            if seen == expected or (isinstance(expected, re.Pattern) and expected.search(seen)):
                return
        self.fail(f"{what} {arguments}: expected {expected}, but saw {seen}")

    def click(self, text):
        self.await_seen(True, "click", text)

    def fill(self, **values):
        for name, value in values.items():
            self.await_seen(True, "fill", name.replace("_", " "), value)

    def go(self, path):
        self.browser.run("location.hash = `#/${arguments[0]}`", path)

    def await_value(self, name, value):
        self.await_seen(value, "value", name)

    def column(self, table, number=0):
        return self.see("column", table, number)

    def await_column(self, expected, table, number=0):
        self.await_seen(expected, "column", table, number)


class DashboardTest(DashboardCase):
    """Every action of the dashboard."""

    # -- channels

    def test_a_server_without_channels_says_so(self):
        self.open()
        self.await_seen(re.compile("No channels. One appears when"), "text")
        self.await_seen("Healthy", "light")
        self.await_value("Messages", "0")

    def test_channels_are_listed_with_their_counts_and_marks(self):
        broker = self.open()
        for n in range(5):
            broker.post(f"c{n}", b"x")
        broker.post("c1", b"x", delay=900)
        broker.get("c2")
        broker.pause("c3")
        broker.set_settings("c4", dead="failed")
        self.await_column(["c0", "c1", "c2", "c3 paused", "c4 dead letters: failed"], "Channels")
        self.until(lambda: [row[1:4] for row in self.see("rows", "Channels")[1:3]]
              == [["1", "0", "1"], ["0", "1", "0"]])  # fmt: skip

    def test_of_many_channels_only_a_page_is_shown_sorted_and_filtered(self):
        broker = self.open("topics")
        for n in range(2_000):
            broker.subscribe(f"c{n:04}", "t")
        broker.post("c1500", b"x")
        self.go("")
        self.await_column([f"c{n:04}" for n in range(50)], "Channels")
        self.click("Next")
        self.await_column([f"c{n:04}" for n in range(50, 100)], "Channels")
        self.click("Ready")
        self.until(lambda: self.column("Channels")[:2] == ["c1500", "c0000"])
        self.fill(Filter_channels="77")
        self.until(lambda: len(self.column("Channels")) == 38)
        self.fill(Filter_channels="none")
        self.await_seen(re.compile("Nothing matches the filter"), "text")

    def test_a_message_is_posted_to_a_new_channel_and_shown(self):
        self.open()
        self.click("Post")
        self.fill(Channel="new", Message='{"a": [1, "b"]}', Content_type="application/json")
        self.click("More parameters")
        self.fill(priority="-7", unique="only")
        self.click("Post")
        self.await_seen("Posted as message 1", "toast")
        self.click("new")
        self.await_column(["1"], "Messages", 1)
        self.click("1")
        self.await_seen('{\n  "a": [\n    1,\n    "b"\n  ]\n}', "body")
        self.click("Show as sent")
        self.await_seen('{"a": [1, "b"]}', "body")
        self.await_value("priority", "-7")
        self.await_value("unique", "only")

    def test_numbers_in_json_keep_their_digits(self):
        broker = self.open("topics")
        broker.post("q", b'{"id": 12345678901234567890, "n": [1.0, 1e2]}')
        self.go("messages/1")
        expected = '{\n  "id": 12345678901234567890,\n  "n": [\n    1.0,\n    1e2\n  ]\n}'
        self.await_seen(expected, "body")

    def test_a_message_is_posted_with_headers_of_its_own(self):
        broker = self.open("channels/q")
        self.click("Post")
        self.click("More parameters")
        self.fill(Message="x", Content_type="text/\u00eb", headers="trace: 4711\n\ntenant")
        self.click("Post")
        self.await_seen("Write each header as name: text, and not as tenant", "wrong")
        self.fill(headers="trace: 4711\n\nTenant: Zo\u00eb \u20ac: 7")
        self.click("Post")
        self.await_seen("Posted as message 1", "toast")
        own = {"trace": "4711", "tenant": "Zo\u00eb \u20ac: 7"}
        message, _ = broker.read_message(1)
        self.assertEqual((message.type, message.headers), ("text/\u00eb", own))
        self.go("topics/t")
        self.click("Publish")
        self.click("More parameters")
        self.fill(Message="x", headers="trace: 1")
        broker.subscribe("q", "t")
        self.click("Publish")
        self.await_seen("Published to 1 channel", "toast")
        self.assertEqual(broker.read_message(2)[0].headers, {"trace": "1"})

    def test_a_binary_body_is_shown_in_hexadecimal_and_a_long_one_is_cut(self):
        broker = self.open("topics", max_message=300_000)
        broker.post("q", bytes(range(0x60, 0x70)) + b"\xff", type="application/octet-stream")
        self.go("messages/1")
        codes = " ".join(f"{code:02x}" for code in range(0x60, 0x70))
        expected = f"000000  {codes}  `abcdefghijklmno\n000010  {'ff':47}  ."
        self.await_seen(expected, "body")
        broker.post("q", 100_000 * "\u20ac".encode())
        self.go("messages/2")
        self.await_seen(re.compile("The first 262 kB of 300 kB"), "text")
        self.assertEqual(self.see("body"), 87_381 * "\u20ac")
        broker.post("q", b"\xff" * 2_000)
        self.go("channels/q")
        previews = ["17 bytes, binary", 200 * "\u20ac" + "…", "over 1024 bytes, binary"]
        self.await_column(previews, "Messages", 2)

    def test_messages_are_paged_by_state(self):
        broker = self.open("channels/q")
        for n in range(60):
            broker.post("q", b"%d" % n, delay=900 * (n > 55))
        broker.get("q")
        self.await_column([str(n) for n in range(1, 51)], "Messages", 1)
        self.click("Next")
        self.await_column([str(n) for n in range(51, 61)], "Messages", 1)
        self.click("in flight")
        self.await_column(["1"], "Messages", 1)
        self.click("delayed")
        self.await_column(["57", "58", "59", "60"], "Messages", 1)
        self.await_value("Ready", "55")

    def test_chosen_messages_are_deleted_released_and_rejected(self):
        broker = self.open("channels/q")
        for _ in range(6):
            broker.post("q", b"x", dead="failed")
        for _ in range(2):
            broker.get("q")
        self.await_column(["1", "2", "3", "4", "5", "6"], "Messages", 1)
        self.click("Choose message 5")
        self.click("Choose message 6")
        self.click("Delete")
        self.await_seen("Deleted 2 messages", "toast")
        self.await_column(["1", "2", "3", "4"], "Messages", 1)
        self.click("Choose message 1")
        self.click("Release")
        self.await_seen("Released 1 message", "toast")
        self.await_value("In flight", "1")
        self.click("Choose all on this page")
        self.assertNotIn("Release", self.see("buttons"))  # some are not in flight
        self.click("Reject")
        self.await_seen("Rejected 4 messages", "toast")
        self.await_value("Ready", "0")
        self.assertEqual(broker.channel_stats("failed")["ready"], 4)

    def test_an_error_among_many_says_how_many_were_done(self):
        broker = self.open("channels/q")
        for _ in range(3):
            broker.post("q", b"x", dead="failed")
        real = broker.reject

        def reject(id, *arguments):
            if id == 3:
                raise linger.Conflict("it is not there")
            real(id, *arguments)

        self.await_column(["1", "2", "3"], "Messages", 1)
        self.click("Choose all on this page")
        with unittest.mock.patch.object(broker, "reject", reject):
            self.click("Reject")
            self.await_seen("Rejected 2 messages. Conflict: it is not there", "toast")

    def test_what_waits_is_changed_one_or_many(self):
        broker = self.open("channels/q")
        for n in range(3):
            broker.post("q", b"x", delay=900 * (n > 0), timeout=7)
        self.click("Choose message 2")
        self.click("Choose message 3")
        self.click("Change")
        self.fill(delay="x")
        self.click("Save")
        self.await_seen(re.compile("delay must be an integer"), "wrong")
        self.fill(delay="0", priority="-5", dead="failed")
        self.click("Save")
        self.await_seen("Changed 2 messages", "toast")
        self.await_column(["0", "-5", "-5"], "Messages", 4)
        self.await_value("Ready", "3")
        message, state = broker.read_message(2)
        self.assertEqual(
            (message.dead, message.timeout, message.deliver, state), ("failed", 7, 0, "ready")
        )
        broker.get("q")
        self.click("2")
        self.await_seen("Message 2 in flight", "heading")
        self.await_seen(["Release", "Reject", "Delete"], "tools")  # and no Change

    def test_a_message_shows_its_headers_its_group_and_that_a_reply_is_awaited(self):
        broker = self.open("topics")
        own = {"tenant": "<i>seven</i>", "trace": "a: b"}
        for _ in range(2):
            broker.post("q", b"x", group="<b>order</b>", headers=own)
        self.go("messages/2")
        self.await_value("headers", "tenant: <i>seven</i>\ntrace: a: b")
        self.await_value("group", "<b>order</b>")
        self.await_seen(
            re.compile("Waits for an earlier message of the group <b>order</b>"), "text"
        )
        caller = threading.Thread(
            target=broker.calls.call, args=("sums", b"1 + 1", "text/plain", 60)
        )
        caller.start()
        self.until(lambda: broker.channel_stats("sums")["ready"])
        self.go("messages/3")
        self.await_value("reply-to", "/messages/3/reply")
        self.await_seen(re.compile("Its sender waits for a reply"), "text")
        broker.calls.reply(3, b"2")
        caller.join()

    def test_a_channel_shows_what_is_blocked_and_its_limit_in_flight(self):
        broker = self.open("channels/q")
        broker.set_settings("q", max_in_flight=2)
        for _ in range(3):
            broker.post("q", b"x", group="g")
        broker.get("q")
        self.await_value("In flight", "1 of 2")
        self.await_value("Blocked", "2")
        self.go("")
        self.await_column(["q 2 blocked"], "Channels")

    def test_dead_letters_are_listed_by_reason_and_redriven_in_one_click(self):
        broker = self.open("dead")
        for n in range(3):
            broker.post(f"c{n}", b"x", dead="failed", deliver=1)
        broker.reject(1, reason="out of paper")
        broker.get("c1")
        broker.release(2)
        broker.reject(3)
        self.await_column(["3", "2", "1"], "Dead letters")
        row = self.see("rows", "Dead letters")[2]
        self.assertEqual(row[1:4], ["c0", "reject", "out of paper"])
        self.fill(Reason="reject", Order="oldest")
        self.await_column(["1", "3"], "Dead letters")
        self.click("Redrive")
        self.await_seen("Message 1 is back in c0", "toast")
        self.await_column(["3"], "Dead letters")
        self.go("channels/failed")
        self.click("Redrive")
        self.click("Redrive")
        self.await_seen("Moved 2 messages", "toast")
        self.assertEqual([broker.channel_stats(f"c{n}")["ready"] for n in range(3)], [1, 1, 1])

    def test_a_dead_letter_tells_its_history(self):
        broker = self.open("topics")
        broker.post("q", b"x", dead="failed", deliver=2)
        broker.get("q")
        broker.reject(1, reason="<b>no</b> paper")
        self.go("messages/1")
        self.await_seen(re.compile("Given up in q after 1 delivery: a consumer rejected"), "text")
        self.await_seen(re.compile("Last error: <b>no</b> paper"), "text")
        self.await_seen(re.compile("Download"), "text")
        self.assertEqual(self.see("buttons")[-4:], ["Reject", "Redrive", "Delete", "Download"])
        self.browser.run("[...document.querySelectorAll('button')].at(-2).focus()")
        self.await_seen(re.compile("Posted [1-9] s ago"), "text")  # it has been renewed
        self.assertEqual(self.browser.run("return document.activeElement.textContent"), "Delete")
        self.click("Delete")
        self.await_seen("Message 1 gone", "heading")
        self.assertEqual(self.see("buttons"), ["Download"])

    def test_a_channel_is_paused_and_resumed(self):
        broker = self.open("channels/q")
        self.click("Pause")
        self.fill(Seconds="900")
        self.click("Pause")
        self.await_seen(re.compile("q\\s*paused"), "text")
        self.assertTrue(broker.info("q")["paused"])
        self.click("Resume")
        self.await_seen("Resumed", "toast")
        self.assertFalse(broker.info("q")["paused"])

    def test_settings_are_changed_and_cleared_and_show_the_defaults(self):
        broker = self.open("channels/q")
        self.await_value("timeout", "30 (default)")
        self.click("Change")
        self.fill(timeout="x")
        self.click("Save")
        self.await_seen(re.compile("timeout must be an integer"), "wrong")
        self.fill(timeout="60", dead="failed")
        self.click("Save")
        self.await_value("timeout", "60")
        self.assertEqual(broker.settings("q"), {"timeout": 60, "dead": "failed"})
        self.click("Change")
        self.click("Clear all")
        self.await_value("dead", "none (default)")
        self.assertEqual(broker.settings("q"), {})

    def test_what_was_done_is_seen_at_once(self):
        self.open("channels/q")
        self.await_value("Ready", "0")
        self.browser.run("window.setTimeout = () => 0")  # after this the page never looks again
        for n in range(1, 4):
            self.click("Post")
            self.fill(Message="x")
            self.click("Post")
            self.await_value("Ready", str(n))
            self.await_column([str(id) for id in range(1, n + 1)], "Messages", 1)

    def test_a_drain_asks_for_the_name_to_be_typed(self):
        broker = self.open("channels/q")
        broker.post("q", b"x")
        self.click("Drain")
        self.fill(**{"Type the channel's name to confirm": "p"})
        self.assertFalse(self.see("click", "Delete all messages"))
        self.fill(**{"Type the channel's name to confirm": "q"})
        self.click("Delete all messages")
        self.await_seen("Drained", "toast")
        self.assertEqual(broker.channels(), [])

    # -- topics

    def test_channels_are_subscribed_and_what_is_published_reaches_them(self):
        broker = self.open("topics")
        self.await_seen(re.compile("No topics"), "text")
        self.go("topics/news")
        self.click("Subscribe a channel")
        self.fill(Channel="mail")
        self.click("Subscribe")
        self.await_column(["mail"], "Subscribers")
        self.click("Publish")
        self.fill(Message="Hello")
        self.click("Publish")
        self.await_seen("Published to 1 channel", "toast")
        self.assertEqual(broker.read_message(1)[0].body, b"Hello")
        self.click("mail")
        self.click("Subscribe")
        self.fill(Topic="other")
        self.click("Subscribe")
        self.await_column(["news", "other"], "Subscriptions")
        self.click("Unsubscribe")
        self.await_column(["other"], "Subscriptions")
        self.click("Subscribe")
        self.fill(Topic="orders.#")
        self.click("It is a pattern")
        self.click("Subscribe")
        self.await_column(["other", "orders.# pattern"], "Subscriptions")
        self.go("topics/orders.eu")
        self.await_column(["mail"], "Subscribers")
        self.await_column(["orders.# pattern"], "Subscribers", 1)
        self.go("topics")
        self.await_column(["other", "orders.# pattern"], "Topics")
        self.click("orders.#")
        self.click("Start")
        self.await_seen(re.compile("Nothing has happened yet"), "text")
        broker.publish("orders.eu", b"Hello")
        self.await_column(["Hello"], "Events", 3)

    def test_a_topic_keeps_publications_and_a_late_subscriber_gets_them(self):
        broker = self.open("topics")
        self.click("Open a topic")
        self.fill(Topic="prices")
        self.click("Open")
        self.await_value("keep", "none (default)")
        self.click("Change")
        self.click("Save")
        self.await_seen(re.compile("give keep, keep-for, or both"), "wrong")
        self.fill(**{"keep": "60", "keep-for": "900"})
        self.click("Save")
        self.await_value("keep-for", "900")
        self.assertEqual(broker.retention.settings("prices"), {"keep": 60, "keep-for": 900})
        for n in range(1, 56):
            broker.publish("prices", b"<i>%d</i>" % n)
        self.await_column([f"<i>{n}</i>" for n in range(1, 51)], "Kept publications", 2)
        self.click("Next")
        self.await_column([str(n) for n in range(51, 56)], "Kept publications")
        self.click("Subscribe a channel")
        self.fill(Channel="late", Copy_what_is_kept_since="53")
        self.click("Subscribe")
        self.await_column(["late"], "Subscribers")
        self.assertEqual(
            [m.body for m, _ in broker.list_messages("late")], [b"<i>54</i>", b"<i>55</i>"]
        )
        self.click("Change")
        self.click("Clear all")
        self.await_seen(re.compile("Nothing is kept"), "text")
        self.assertEqual(broker.retention.settings("prices"), {})

    # -- schedules

    def test_schedules_are_made_run_and_deleted(self):
        broker = self.open("schedules")
        self.await_seen(re.compile("No schedules"), "text")
        self.click("New schedule")
        self.fill(Name="<b>nightly</b>", Channel="jobs", Times="0 3 * *", Message="Report")
        self.click("Save")
        self.await_seen(re.compile("five fields"), "wrong")
        self.fill(Times="0 3 29 feb *", Time_zone_of_these="Asia/Tokyo")
        self.click("Skip missed times")
        self.click("More parameters")
        self.fill(unique="only")
        self.click("Save")
        self.await_column(["<b>nightly</b>"], "Schedules")
        row = self.see("rows", "Schedules")[0]
        self.assertEqual(row[1:3], ["jobs", "0 3 29 feb * (Asia/Tokyo)"])
        self.assertRegex(row[3], "^20[0-9]{2}-02-29 03:00:00[+]09:00$")
        self.assertEqual(row[4:6], ["\u2013", "\u2013"])
        schedule = broker.schedules.read("<b>nightly</b>")
        self.assertEqual((schedule.body, schedule.catch_up), (b"Report", False))
        self.click("Run")
        self.await_seen("Posted as message 1", "toast")
        self.assertEqual(broker.read_message(1)[0].unique, "only")
        self.click("<b>nightly</b>")
        self.await_seen("Report", "body")
        self.await_value("unique", "only")
        self.click("Delete")
        self.click("Delete")
        self.await_seen("Schedule deleted", "toast")
        self.await_seen(re.compile("No schedules"), "text")
        self.assertEqual(broker.schedules.read_all(), [])

    def test_schedules_tell_when_they_posted_and_what_failed(self):
        broker = self.open("schedules", hlm=1)
        broker.post("full", b"x")
        for name, channel in (("a", "full"), ("b", "free")):
            broker.schedules.put(name, channel, b"x", every=1)
        posted = re.compile("^20[0-9-]{8} [0-9:]{8}[+]00:00$")
        self.await_seen(posted, "cell", "Schedules", 1, 4)
        self.await_seen(re.compile("high-level mark of 1"), "cell", "Schedules", 0, 5)
        self.fill(Filter_schedules="FREE")
        self.await_column(["b"], "Schedules")

    # -- live

    @unittest.mock.patch.object(linger, "LISTENER_CHECK_INTERVAL", 0.1)
    def test_what_happens_in_a_channel_is_seen_as_it_happens(self):
        broker = self.open("channels/q")
        self.click("Start")
        self.await_seen(re.compile("Nothing has happened yet"), "text")
        broker.post("q", b"Hello")
        broker.delete(broker.get("q").id)
        events = [["deleted", "1", "Hello"], ["delivered", "1", "Hello"], ["posted", "1", "Hello"]]
        self.until(lambda: [row[1:] for row in self.see("rows", "Events")] == events)
        self.click("Stop")
        self.until(lambda: not self.server._waiting)

    @unittest.mock.patch.object(linger, "LISTENER_CHECK_INTERVAL", 0.1)
    def test_publications_on_a_topic_are_seen_as_they_happen(self):
        broker = self.open("topics/t")
        self.click("Start")
        self.await_seen(re.compile("Nothing has happened yet"), "text")
        broker.publish("t", b"<b>Hello</b>")
        events = [["published", "", "<b>Hello</b>"]]
        self.until(lambda: [row[1:] for row in self.see("rows", "Events")] == events)
        self.go("dead")  # which ends it
        self.until(lambda: not self.server._waiting)

    # -- what may go wrong

    def test_hostile_names_and_bodies_are_text(self):
        broker = self.open()
        markup = """<script>window.hit=1</script>"'><img src=x onerror="window.hit=1">&amp;"""
        names = [markup, "../a b?c#d%41", "\u202eabc \u0642\u0646\u0627\u0629"]
        for name in names:
            broker.post(name, markup.encode(), dead=name + "!", type="text/html")
            broker.subscribe(name, name)
            broker.schedules.put(name, name, markup.encode(), every=900)
        self.await_column(sorted(names), "Channels")
        self.go("schedules")
        self.await_column(sorted(names), "Schedules", 1)
        for number, name in enumerate(names, 1):
            for view, what in (("channels", "Messages"), ("topics", "Subscribers")):
                self.go(f"{view}/{urllib.parse.quote(name, safe='')}")
                expected = [markup] if view == "channels" else [name]
                self.await_column(expected, what, 2 if view == "channels" else 0)
            self.go(f"messages/{number}")
            self.await_seen(markup, "body")
            broker.reject(number, reason=markup)
        self.go("dead")
        self.await_column([markup] * 3, "Dead letters", 3)
        script = "return [window.hit, document.querySelectorAll('main img, main script').length]"
        self.assertEqual(self.browser.run(script), [None, 0])

    def test_a_name_that_a_browser_cannot_send_is_refused_in_words(self):
        self.open("channels/..")
        self.await_seen(re.compile("A browser cannot send the name"), "text")

    def test_a_message_that_is_not_there_is_not_awaited(self):
        self.open("messages/7")
        self.await_seen(re.compile("Message 7 gone"), "text")
        self.assertNotIn("Loading", self.see("text"))
        self.go("messages/x")
        self.await_seen(re.compile("This cannot be shown"), "text")
        self.browser.log()  # which says so, too

    def test_an_error_is_in_sight_however_long_the_form(self):
        self.addCleanup(self.browser.resize, 1280, 900)
        self.browser.resize(1280, 500)
        self.open("channels/q")
        self.click("Post")
        self.click("More parameters")
        self.fill(Message="x", timeout="soon")
        self.click("Post")
        self.await_seen(re.compile("timeout must be an integer"), "wrong")
        script = """
            const box = document.querySelector("dialog .wrong").getBoundingClientRect();
            return document.elementFromPoint(box.left + 5, box.top + 5)?.className;
        """
        self.assertEqual(self.browser.run(script), "wrong")

    def test_an_error_is_shown_in_the_servers_words_and_the_form_stays(self):
        self.open(hlm=1)
        for _ in range(2):
            self.click("Post")
            self.fill(Channel="q", Message="x")
            self.click("Post")
        self.await_seen(re.compile("^Full: .*mark"), "wrong")
        self.click("Cancel")

    def test_the_page_recovers_when_the_server_was_gone(self):
        broker = self.open(dbfile=self.dbfile)
        broker.post("before", b"x")
        self.await_column(["before"], "Channels")
        port = self.server.server_port
        self.server.close()
        self.await_seen(re.compile("does not answer"), "problem")
        self.assertEqual(self.column("Channels"), ["before"])
        self.server = self.serve(port=port, dbfile=self.dbfile)
        self.server.broker.post("after", b"x")
        self.await_column(["after", "before"], "Channels")
        self.await_seen("", "problem")
        self.assertEqual(self.browser.run("return problems.size"), 0)

    def test_a_server_that_hangs_counts_as_gone(self):
        broker = self.open("topics")
        self.await_seen("Healthy", "light")
        self.browser.run("""
            const timeout = AbortSignal.timeout;
            AbortSignal.timeout = time => timeout.call(AbortSignal, time / 100);
        """)
        goes_on = threading.Event()
        self.addCleanup(goes_on.set)
        with unittest.mock.patch.object(broker, "check_health", lambda: goes_on.wait(PATIENCE)):
            self.await_seen("Not reachable", "light")
            self.await_seen(re.compile("does not answer"), "problem")
        goes_on.set()
        self.await_seen("Healthy", "light")

    def test_it_works_below_a_prefix(self):
        server = self.serve()
        front = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Front)
        front.target = server.server_port
        self.addCleanup(front.server_close)
        thread = threading.Thread(target=front.serve_forever, args=(0.01,))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(front.shutdown)
        self.addCleanup(self.browser.open, "about:blank")
        for path in ("/queue/", "/queue"):
            server.broker.post(f"to{path[6:]}", b"x")
            self.browser.open(f"http://127.0.0.1:{front.server_port}{path}")
            self.await_seen("Healthy", "light")
            self.until(lambda path=path: f"to{path[6:]}" in self.column("Channels"))

    def test_it_is_used_with_the_keyboard_alone(self):
        broker = self.open()
        broker.post("q", b"x")
        self.await_column(["q"], "Channels")

        def tab_to(text):
            script = "const e = document.activeElement; return e.ariaLabel || e.textContent"
            for _ in range(30):
                self.browser.press("\ue004")
                if self.browser.run(script) == text:
                    return
            self.fail(f"the tab key does not lead to {text}")

        tab_to("Post")
        self.browser.press("\ue007")
        self.browser.press(*"q2", "\ue004", *"hello")
        tab_to("Post")
        self.browser.press("\ue007")
        self.await_seen("Posted as message 2", "toast")
        tab_to("q")
        self.browser.press("\ue007")
        tab_to("Drain")
        self.browser.press("\ue007")
        self.assertIn("Delete all messages", self.see("buttons"))
        self.browser.press("\ue00c")  # Escape
        self.await_column(["1"], "Messages", 1)
        self.assertEqual(self.browser.run("return document.activeElement.textContent"), "Drain")

    def test_a_chart_tells_its_values_to_the_keyboard(self):
        self.past_hour()
        self.open()
        expected = "posted6.0delivered5.0deleted4.0failed0.2"
        self.until(lambda: self.browser.run(KEY, "ArrowLeft") == f"now{expected}")
        self.assertEqual(self.browser.run(KEY, "ArrowLeft"), f"30 s ago{expected}")

    # -- how it looks

    VIEWS = types.MappingProxyType({
        "overview": "", "channel": "channels/mail", "message": "messages/2", "topics": "topics",
        "topic": "topics/orders", "schedules": "schedules", "schedule": "schedules/poll",
        "dead": "dead",
    })  # fmt: skip

    def past_hour(self):
        """A history of 30 posts, 25 deliveries and so on in each of its intervals."""

        def since(_, now):
            return [(now + 5 * n, (30, 25, 20, 1, 0, 5 * n, 9)) for n in range(1, 721)]

        patch = unittest.mock.patch.object(linger.History, "since", since)
        patch.start()
        self.addCleanup(patch.stop)

    def sample(self):
        self.past_hour()
        broker = self.open("topics", dbfile=self.dbfile)
        broker.set_settings("images", dead="failed", max_in_flight=2)
        broker.set_settings("mail", dead="failed", timeout=60)
        broker.subscribe("mail", "orders")
        broker.patterns.subscribe("mail", "invoices.#")
        broker.retention.put("orders", 100, 86_400)
        broker.schedules.put(
            "nightly report", "reports", b"x", cron="0 3 * * mon-fri", tz="Asia/Tokyo"
        )
        broker.schedules.put("poll", "mail", b"x", every=300, unique="poll")
        body = b'{"order": 4711, "items": ["book", "pen"]}'
        for channel in ("mail", "images", "reports", "a-channel-with-a-rather-long-name." * 3):
            for n in range(1, 8):
                own = {"headers": {"trace": f"4711-{n}"}, "group": f"order {n % 2}"}
                broker.post(channel, body * n, type="application/json", **own)
        for number in (2, 9):
            broker.reject(number, reason="ValueError: there is no such order")
        broker.get("images")
        broker.pause("reports")
        broker.post("mail", body, priority=-5, unique="invoice-4711")
        broker.publish("orders", body)
        return broker

    def each_view(self, *sights):
        """Shows each view of a sample with these themes and widths; yields their names."""
        self.addCleanup(self.browser.resize, 1280, 900)
        self.addCleanup(self.browser.set_theme, "light")
        self.sample()
        script = "return document.querySelector('main tbody a, main pre') !== null"
        for name, path in self.VIEWS.items():
            for theme, width in sights:
                self.browser.resize(width, 900)
                self.browser.set_theme(theme)
                self.go(path)
                self.until(lambda: self.browser.run(script))
                yield f"{name}-{theme}-{width}"

    def test_no_view_is_wider_than_a_phone(self):
        """And each is kept as a picture, for those who change it."""
        SCREENS.mkdir(exist_ok=True)
        for name in self.each_view(("light", 1280), ("dark", 1280), ("light", 390)):
            (SCREENS / f"{name}.png").write_bytes(self.browser.picture())
            script = "return document.documentElement.scrollWidth - innerWidth"
            self.assertLessEqual(self.browser.run(script), 0, name)

    @unittest.skipUnless(AXE, "needs axe-core: AXE=node_modules/axe-core/axe.min.js")
    def test_axe_finds_nothing_that_keeps_anybody_out(self):
        source = Path(AXE).read_text()
        script = """
            const options = {...arguments[0], resultTypes: ["violations"]};
            return axe.run(options).then(found => found.violations.map(
                v => [v.impact, v.id, v.nodes[0].html, v.nodes[0].failureSummary]))
        """
        for name in self.each_view(("light", 1280), ("dark", 1280)):
            if not self.browser.run("return Boolean(window.axe)"):
                self.browser.run(source)
            rules = {"runOnly": ["color-contrast"]} if "dark" in name else {}
            self.assertEqual(self.browser.run(script, rules), [], name)
        self.go("schedules")
        self.click("New schedule")
        self.assertEqual(self.browser.run(script, {}), [])


class Front(http.server.BaseHTTPRequestHandler):
    """A proxy that passes what comes below /queue to a server."""

    def do_GET(self):
        path = self.path[len("/queue") :] or "/"
        client = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=PATIENCE)
        with contextlib.closing(client):
            client.request(self.command, path, None, dict(self.headers))
            answer = client.getresponse()
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the page has been closed
                self.wfile.write(answer.read())

    def log_message(self, *arguments):
        pass


class DashboardTokenTest(DashboardCase):
    """The dashboard of a server with tokens."""

    def setUp(self):
        super().setUp()
        tokens = self.write_tokens(
            "a b0ss read,write,admin\nb r3ad read\nc wr1te write\nd j0bs read,write,admin jobs*\n"
        )
        self.broker = self.open(tokens=str(tokens))
        self.broker.post("jobs", b"x")
        self.broker.post("mail", b"x")

    def sign_in(self, token):
        self.browser.run("sessionStorage.clear(); location.hash = ''; location.reload()")
        self.fill(Token=token)
        self.click("Sign in")

    def test_it_asks_for_a_token_and_keeps_it_for_the_tab(self):
        for token in ("wrong", "\u20ac"):
            self.sign_in(token)
            self.await_seen(re.compile("The token is not valid"), "text")
        self.fill(Token="b0ss")
        self.click("Sign in")
        self.await_column(["jobs", "mail"], "Channels")
        self.browser.run("location.reload()")
        self.await_column(["jobs", "mail"], "Channels")
        self.assertEqual(self.browser.run("return localStorage.length + document.cookie"), "0")
        self.click("Sign out")
        self.await_seen(re.compile("asks for a token"), "text")
        self.assertIsNone(self.browser.run("return sessionStorage.getItem('linger-token')"))

    def test_it_offers_only_what_the_token_may_do(self):
        self.sign_in("r3ad")
        self.await_column(["jobs", "mail"], "Channels")
        self.assertEqual(self.see("buttons"), ["Sign out", "Channel", "Ready", "Oldest"])
        self.go("channels/jobs")
        self.click("Choose message 1")
        self.await_seen("1", "value", "Ready")
        buttons = set(self.see("buttons"))
        self.assertEqual(buttons & {"Reject", "Delete"}, {"Reject", "Delete"})
        denied = {"Post", "Pause", "Drain", "Redrive", "Subscribe", "Change"}
        self.assertEqual(buttons & denied, set())
        self.broker.schedules.put("nightly", "jobs", b"x", every=900)
        self.go("schedules")
        self.await_column(["nightly"], "Schedules")
        self.assertEqual(self.see("buttons"), ["Sign out"])
        self.sign_in("wr1te")
        self.await_seen(re.compile("This token may not read"), "text")
        self.assertEqual(self.see("buttons"), ["Sign out", "Post", "Publish"])

    def test_a_token_for_some_channels_sees_only_those(self):
        self.sign_in("j0bs")
        self.await_column(["jobs"], "Channels")
        self.assertIsNone(self.see("value", "Uptime"))
        self.click("Post")
        self.fill(Channel="mail", Message="x")
        self.click("Post")
        self.await_seen(re.compile("Not allowed: this name is not among"), "wrong")


# -- Files ---------------------------------------------------------------------------------------

MAX_LINES = {"section": 1_000, "class": 450, "function": 40}
TOO_LARGE = set()  # sections, classes and functions of linger.py that exceed them: none

STATEMENT = re.compile(
    r"\s*(?:with (?:recursive )?\w+ \(|select\s|insert into\s|update \w+\s+set\s|delete\s+from\s)"
)
ONCE = (
    "SCHEMA",
    "BEFORE_MIGRATION",
    "AFTER_MIGRATION",
    "EVENT_ROWS",
)  # constants with statements that run once in a file, and the pattern of EVENT_STATEMENTS
MEANT_SCANS = {  # statements that read a whole table or index, which the call that uses them asks
    "ALL_PAUSES": {"pauses"},
    "ALL_RETENTION": {"retention"},
    "CHANNELS_OF_PATTERNS": {"json_each"},
    "DELETE_WANTED": {"json_each"},
    "EVENT_STATEMENTS[16]": {"json_each"},  # of DELETE_WANTED
    "FIND_WANTED": {"json_each"},
    "KEPT_COUNTS": {"retention"},
    "OLD_PUBLICATIONS": {"publications"},  # one row at a time, by its id
    "PUBLISHED_AFTER": {"publications"},  # from an id on
    "ALL_SETTINGS": {"settings"},
    "LIST_SCHEDULES": {"schedules"},
    "SCHEDULE_COUNTS": {"schedules"},
    "SCHEDULE_TIMES": {"schedules"},
    "SET_RETENTION": {"retention"},
    "TOPICS_TO_TRIM": {"retention"},
    "SET_SCHEDULE": {"schedules"},
    "ALL_PATTERNS": {"patterns"},
    "CHANNEL_NAMES": {"channels", "patterns", "subscriptions"},
    "FULL_MATCHING": {"json_each", "subscriptions"},
    "KEPT_PUBLICATIONS": {"json_each", "nearest"},
    "MATCHING_CHANNELS": {"json_each", "subscriptions"},
    "PUBLISH_MATCHING": {"json_each", "subscriptions"},
    "SUBSCRIBE_PATTERN": {"patterns"},
    "COUNT_MESSAGES": {"messages"},  # after a copy
    "COUNT_SERVING": {"sessions"},
    "DATABASE_SIZE": {"pragma_page_count", "pragma_page_size"},
    "DRAIN_HIDDEN": {"messages"},  # the index of all that is hidden
    "ENDED_PAUSES": {"pauses"},
    "DUE_SOON": {"channels"},  # by Watch, in a small share of the time
    "END_PAUSES": {"pauses"},
    "FIND_STORED": {
        "channels",
        "dedups",
        "patterns",
        "pauses",
        "publications",
        "retention",
        "replies",
        "schedules",
        "settings",
        "subscriptions",
    },  # up to the first row
    "FORGET_SESSIONS": {"sessions"},
    "IDENTIFY": {"sqlite_master"},
    "LIST_MANY": {"messages"},  # from an id on
    "MESSAGE_TOTALS": {"channels"},
    "LOOK_AROUND": {"sessions"},
    "READY_CHANNELS": {"json_each"},
    "RECORD_TIME": {
        "channels",
        "dedups",
        "pauses",
        "retention",
        "schedules",
    },  # up to the first row
    "NEXT_BY_CHANNEL": {"channels"},  # once, at the start
    "SUBSCRIPTION_TOTALS": {"patterns", "subscriptions"},
    "PICK_LIMITED": {"chosen"},  # of one row
    "SELECT_BATCH": {"json_each"},
    "LEASE_BATCH": {"json_each"},
    "DELETE_BATCH": {"json_each"},
    "SELECT_BATCH_ROWS": {"json_each"},
    "TAKE_OVER_TIMES": {"messages"},  # once, of a database of 1.0.1
    "TOPIC_NAMES": {"subscriptions"},
}


def sections(source):
    """The names of the sections, by the lines on which their banners begin."""
    banners = re.finditer(r"(?m)^# -{4,}\n# ([^:\n]+):", source)
    return {source.count("\n", 0, banner.start()) + 1: banner[1] for banner in banners}


def oversized(source):
    """What exceeds `MAX_LINES`, as (kind, name, lines)."""
    starts = sections(source)
    ends = [*starts, source.count("\n") + 1][1:]
    sizes = [("section", starts[line], end - line) for line, end in zip(starts, ends)]
    nodes = parse(source).body.copy()
    for node in nodes:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            sizes.append((kind, node.name, node.end_lineno - node.lineno + 1))
            nodes += node.body if kind == "class" else []
    return [size for size in sizes if size[2] > MAX_LINES[size[0]]]


def print_sizes():
    """What `make sizes` shows: the lines of each section, then whatever is too large."""
    starts = sections(SOURCE)
    ends = [*starts, SOURCE.count("\n") + 1][1:]
    for line, end in zip(starts, ends):
        print(f"{end - line:6,}  {starts[line]}")
    for kind, name, lines in oversized(SOURCE):
        print(f"{lines:6,}  {kind} {name}: at most {MAX_LINES[kind]:,}")


@functools.cache
def functions_of(source):
    """The code objects of all functions, lambdas and comprehensions."""
    found = [compile(parse(source), "linger.py", "exec")]
    for code in found:
        found += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found[1:]


@functools.cache
def global_names(source):
    """Each use of a name of the module or of a builtin in a function, as (code object, name).

    The compiler has told them from local names, and left out the annotations.
    """
    return [
        (code, step.argval)
        for code in functions_of(source)
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL")
    ]


def uses_of_sections_below(source):
    """Where code of one section names what a later section defines.

    What runs at import can use nothing below it in any case.
    """
    starts = list(sections(source))
    defined = {}
    for statement in parse(source).body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
            defined.setdefault(statement.name, statement.lineno)
        else:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    defined.setdefault(node.id, node.lineno)
    uses = []
    for code, name in global_names(source):
        place = bisect.bisect(starts, defined.get(name, 0))
        if place > bisect.bisect(starts, code.co_firstlineno):
            uses.append(f"{code.co_name}, line {code.co_firstlineno}, uses {name}")
    return uses


def statements():
    """The statements of linger.py that run again and again, by name."""
    found = {}
    for name, value in vars(linger).items():
        if name.isupper() and name not in ONCE:
            parts = value if isinstance(value, (tuple, list)) else [value]
            for number, part in enumerate(parts):
                if isinstance(part, str) and STATEMENT.match(part) and part not in found.values():
                    found[name if part is value else f"{name}[{number}]"] = part
    return found


ON_ABORT = 2  # what sqlite3.c calls OE_Abort


def query_plan(connection, sql):
    """The steps of SQLite's plan, as (whether it is in another step, its text)."""
    parameters = dict.fromkeys(re.findall(r":(\w+)", sql), 1)
    rows = connection.execute("explain query plan " + sql, parameters)
    return [(parent, detail) for _, parent, _, detail in rows]


def needless_scans(connection):
    """Reads of whole tables or indexes that `MEANT_SCANS` does not name."""
    found = []
    for name, sql in statements().items():
        known = MEANT_SCANS.get(name, set()) | {"CONSTANT", "SUBQUERY"}
        known |= set(re.findall(r"(\w+) \([\w, ]*\) as \(", sql))  # its common table expressions
        for _, step in query_plan(connection, sql):
            scan = re.match(
                r"SCAN (?:TABLE )?(\w+)|SEARCH (?:TABLE )?(\w+) USING .*\(rowid[<>]\?\)", step
            )
            all_ready = name == "OLDEST_READY" and "ready_messages (channel=?)" in step
            if all_ready or (scan and (scan[1] or scan[2]) not in known):
                found.append(f"{name}: {step}")
    return found


class FileTest(unittest.TestCase):
    def test_it_parses_as_python_3_9_and_imports_only_the_standard_library(self):
        names = set()
        for node in ast.walk(parse(SOURCE)):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
        known = getattr(sys, "stdlib_module_names", None)
        if known is None:
            self.skipTest("this Python does not list its modules")
        self.assertEqual(names - set(known), set())

    def test_a_server_imports_nothing_that_is_large_and_of_no_use_to_it(self):
        """Each of these takes milliseconds of its start, and most a megabyte."""
        # `traceback`, which it needs, imports some of them itself in Python 3.14.
        imports = "import sys, traceback; own = {*sys.modules}; import linger"
        program = f"{imports}; print(*{{*sys.modules}} - own)"
        output = run_python(program).stdout
        needless = {"asyncio", "concurrent.futures", "ctypes", "inspect", "logging", "platform",
                    "multiprocessing", "pickle", "unittest", "urllib.request", "uuid"}  # fmt: skip
        self.assertEqual(needless & set(output.split()), set())

    def test_a_section_uses_only_names_of_its_own_and_of_sections_above(self):
        self.assertEqual(uses_of_sections_below(SOURCE), [])

    def test_a_use_of_a_section_below_is_found_wherever_it_stands(self):
        for text, names in (
            ("def f(): return later()", ["later"]),
            ("def f(): return [x for x in SECOND if later]", ["SECOND", "later"]),
            ("class C:\n    x = property(lambda self: FIRST)", ["FIRST"]),
            ("class C:\n    def f(self, x=lambda: SECOND): pass", ["SECOND"]),
            ("def f():\n    def g():\n        global FIRST\n        FIRST = 1", ["FIRST"]),
            ("def f(later): return later", []),
            ("def f():\n    later = 1\n    return lambda: later", []),
            ("def f(x: later) -> later:\n    y: later = x\n    return y.later", []),
            ("def f(): return [later for later in f()]", []),
        ):
            with self.subTest(text):
                source = f"""from __future__ import annotations
# ----
# A: above.
# ----
{text}
# ----
# B: below.
# ----
def later(): pass
FIRST, SECOND = 1, 2
"""
                found = [use.rpartition(" ")[2] for use in uses_of_sections_below(source)]
                self.assertEqual(found, names)

    def test_a_section_knows_nothing_of_what_its_users_do(self):
        """The modules that a section must not use."""
        starts = sections(SOURCE)
        for section, modules in (
            ("Store", {"argparse", "http", "json", "select", "socket", "ssl"}),
            ("Broker", {"argparse", "http", "json", "select", "sqlite3", "ssl", "sys", "urllib"}),
            ("Access", {"argparse", "http", "json", "select", "socket", "sqlite3", "sys"}),
        ):
            with self.subTest(section):
                (start,) = (line for line in starts if starts[line] == section)
                end = min(line for line in [*starts, math.inf] if line > start)
                used = [
                    f"{code.co_name}, line {code.co_firstlineno}, uses {name}"
                    for code, name in global_names(SOURCE)
                    if name in modules and start <= code.co_firstlineno < end
                ]
                self.assertEqual(used, [])

    def test_the_sections_are_those_that_its_docstring_lists(self):
        listed = re.findall(
            r"(?m)^    ([A-Z][A-Za-z ]*?)  ", ast.get_docstring(parse(SOURCE), False)
        )
        self.assertEqual(listed, list(sections(SOURCE).values()))

    def test_no_section_class_or_function_is_too_large(self):
        """`TOO_LARGE` names the exceptions, and may only shrink."""
        found = {f"{kind} {name}" for kind, name, _ in oversized(SOURCE)}
        self.assertEqual(found, TOO_LARGE)

    def test_what_is_too_large_is_found(self):
        def method(lines):
            return "    def f(self):\n" + (lines - 1) * "        pass\n"

        fits = "class Fits:\n" + method(9) + 11 * method(40)
        too_large = "class TooLarge:\n" + method(41) + 11 * method(40)
        banner = "# ----\n# {}: a section.\n# ----\n"
        source = banner.format("Short") + fits + 547 * "\n" + banner.format("Long") + too_large
        self.assertEqual(
            oversized(source + 516 * "\n"),
            [("section", "Long", 1_001), ("class", "TooLarge", 482), ("function", "f", 41)],
        )

    def test_the_signs_on_the_first_screen_point_to_what_is_there(self):
        signs = linger.__doc__.partition("Where to look")[2]
        found = re.findall(r"`([\w.]+)`[^`]*? in ([A-Z][A-Za-z ]*?)(?=[, \n(]|$)", signs)
        self.assertGreater(len(found), 7)
        texts = re.split(r"(?m)^# -{90,}\n# ", SOURCE)
        by_section = {text.partition(":")[0]: text for text in texts}
        for name, section in found:
            last = name.rpartition(".")[2]
            with self.subTest(name):
                self.assertRegex(
                    by_section[section], rf"(?m)^(class {last}\b| *def {last}\(|{last} = )"
                )

    def test_every_public_name_has_a_docstring(self):
        for name in linger.__all__:
            public = getattr(linger, name)
            self.assertTrue(public.__doc__, name)
            kinds = public.__mro__ if isinstance(public, type) else ()
            own = [vars(kind) for kind in kinds if kind.__module__ == linger.__name__]
            for attribute, member in dict(collections.ChainMap(*own)).items():
                if (
                    callable(member)
                    and not attribute.startswith("_")
                    and public is not linger.Message
                ):
                    self.assertTrue(member.__doc__, f"{name}.{attribute}")

    def test_every_route_has_its_endpoint(self):
        for route in linger.ROUTES:
            self.assertTrue(callable(getattr(linger.Api, route.endpoint)), route)

    @unittest.skipUnless(shutil.which("make"), "needs make")
    def test_make_help_lists_every_target(self):
        targets = re.findall(r"(?m)^\.PHONY: (.*)", (HERE / "Makefile").read_text())[0].split()
        output = subprocess.check_output(["make", "help"], cwd=HERE, text=True)
        self.assertEqual(re.findall(r"(?m)^make ([\w-]+) +[^ ]", output), targets)

    def test_ci_runs_on_every_python_that_is_supported(self):
        workflow = (HERE / ".github/workflows/ci.yml").read_text()
        versions = re.findall(r'"3\.([0-9]+)"', re.findall(r"(?m)python: (\[.*\])", workflow)[0])
        self.assertEqual([int(minor) for minor in versions], list(range(9, 15)))

    def database(self):
        connection = sqlite3.connect(":memory:")
        self.addCleanup(connection.close)
        linger.create_schema(connection)
        return connection

    def test_no_statement_reads_a_whole_table_but_those_that_are_meant_to(self):
        self.assertEqual(needless_scans(self.database()), [])
        self.assertEqual(set(MEANT_SCANS) - set(statements()), set())

    def test_the_usual_calls_need_no_journal_of_each_statement(self):
        """SQLite keeps one if a program may abort, and supposes that of each call of a function."""
        for sql in (linger.ADD_MESSAGE, *linger.NEXT_TAKES[0][1:], linger.DELETE_LEASED):
            names = dict.fromkeys(re.findall(r":(\w+)", sql), 1)
            for _, step, _, reaction, *_ in self.database().execute("explain " + sql, names):
                self.assertNotIn(step, ("Function", "PureFunc"), sql)
                self.assertFalse(step in ("Halt", "HaltIfNull") and reaction == ON_ABORT, sql)

    def test_without_any_one_of_the_indexes_a_statement_reads_a_whole_table(self):
        indexes = self.database().execute(
            "select name from sqlite_master where type = 'index' and sql is not null"
        )
        for (index,) in indexes.fetchall():
            with self.subTest(index):
                connection = self.database()
                connection.execute(f"drop index {index}")
                self.assertTrue(any(needless_scans(connection)))

    def test_no_statement_sorts_bodies(self):
        connection = self.database()
        for name, sql in statements().items():
            if "body" in sql:
                with self.subTest(name):
                    steps = [detail for outer, detail in query_plan(connection, sql) if not outer]
                    self.assertNotIn("TEMP B-TREE", "; ".join(steps))

    def test_a_sort_of_bodies_would_be_seen(self):
        plan = query_plan(self.database(), "select body from messages where id > 1 order by type")
        self.assertIn((0, "USE TEMP B-TREE FOR ORDER BY"), plan)

    def test_every_statement_is_a_constant_of_the_module(self):
        """Or the tests of statements would not see it."""
        constants = [constant for code in functions_of(SOURCE) for constant in code.co_consts]
        found = [text for text in constants if isinstance(text, str) and STATEMENT.match(text)]
        self.assertEqual([text for text in found if "from sqlite_master" not in text], [])

    def test_statements_keep_the_rules(self):
        for name, sql in statements().items():
            with self.subTest(name):
                self.assertNotRegex(sql, r"(?i)returning|random|current_|strftime|iif\(")
                self.assertEqual(re.findall(r"[A-Z]{2,}", sql), [])


class ReadmeTest(Folder):
    """README.md says everything, in short lines, and its examples give what they show."""

    INTERNAL_LIMITS = frozenset((
        "MAX_BLOB", "MAX_CACHED_HEAD", "MAX_DELAYED_FAILURES", "MAX_DUE_CHANNELS",
        "MAX_FAILING_ADDRESSES", "MAX_IDLE_CHANNELS", "MAX_IDLE_THREADS", "MAX_INTEGER",
        "MAX_LINES_BYTES", "MAX_REFUSED_CONNECTIONS", "MAX_RECEIVE_SIZE", "MAX_REQUEST_HEAD",
        "MAX_REQUEST_LINE", "MAX_RETRY_DELAY", "MAX_FLIGHTS", "MAX_GROWTH", "MAX_NOTED", "MAX_SHM",
        "MAX_SIMULTANEOUS", "MAX_TIMER",
    ))  # fmt: skip

    def setUp(self):
        super().setUp()
        self.readme = (HERE / "README.md").read_text()

    # -- form

    def prose(self):
        """The paragraphs and list items, as lists of lines: no code, tables or headings."""
        text = re.sub(r"^```.*?^```$", "", self.readme, flags=re.M | re.S)
        paragraph = []
        for line in [*text.split("\n"), ""]:
            if line.startswith("- "):
                yield paragraph
                paragraph = [line]
            elif not line or line.startswith(("#", "|", "    ")):
                yield paragraph
                paragraph = []
            else:
                paragraph.append(line)

    def headings(self):
        """Level, text and anchor of each heading, as GitHub makes them."""
        text = re.sub(r"^```.*?^```$", "", self.readme, flags=re.M | re.S)
        for marks, title in re.findall(r"^(#+) (.+)$", text, re.M):
            kept = re.sub(r"[^\w\- ]", "", title.lower())
            yield len(marks), title, kept.replace(" ", "-")

    def section(self, title):
        """The text below a heading of the second level."""
        return self.readme.partition(f"\n## {title}\n")[2].partition("\n## ")[0]

    def test_no_line_of_prose_is_longer_than_120_characters(self):
        self.assertGreater(sum(map(len, self.prose())), 300)
        self.assertEqual([line for p in self.prose() for line in p if len(line) > 120], [])

    def test_no_paragraph_has_more_than_five_lines(self):
        self.assertEqual([p for p in self.prose() if len(p) > 5], [])

    def test_every_link_leads_to_a_heading_or_a_file(self):
        anchors = [anchor for _, _, anchor in self.headings()]
        links = re.findall(r"\]\(([^)]*)\)", self.readme)
        inner = [link[1:] for link in links if link.startswith("#")]
        self.assertEqual([link for link in inner if link not in anchors], [])
        files = [link for link in links if not link.startswith("#")]
        self.assertEqual([file for file in files if not (HERE / file).is_file()], [])
        self.assertEqual([a for a in anchors if anchors.count(a) > 1], [])

    def test_the_contents_list_every_section_after_it(self):
        links = re.findall(r"^- \[(.*?)\]\(#(.*?)\)", self.section("Contents"), re.M)
        sections = [(title, anchor) for level, title, anchor in self.headings() if level == 2]
        first = next(n for n, (title, _) in enumerate(sections) if title == "Contents") + 1
        self.assertEqual(links, sections[first:])

    def test_every_recipe_has_an_example_and_says_when_not_to_use_it(self):
        for recipe in self.section("Recipes").split("\n### ")[1:]:
            title = recipe.partition("\n")[0]
            self.assertRegex(recipe, r"(?m)^```(console|pycon)$", title)
            self.assertIn("\n**When not:** ", recipe, title)

    # -- completeness

    def test_every_route_parameter_and_counter_is_in_the_reference(self):
        names = [f"`{route.method} {route.path}`" for route in linger.ROUTES]
        names += [f"`{p.name}`" for p in (*linger.CHANNEL_PARAMETERS, *linger.SINGLE_PARAMETERS)]
        names += [f"`{counter}`" for counter in linger.COUNTERS]
        self.assertEqual([name for name in names if name not in self.section("HTTP API")], [])
        metrics = [f"`{metric.name}`" for metric in linger.METRICS]
        self.assertEqual([m for m in metrics if m not in self.section("Deployment")], [])

    def test_every_response_header_is_in_the_reference(self):
        headers = set(re.findall(r"x-linger-[a-z-]*[a-z]", SOURCE))
        headers = headers - {"x-linger-h"} | {"x-linger-h-<name>"}
        self.assertGreater(len(headers), 15)
        self.assertEqual([h for h in headers if f"`{h}`" not in self.section("HTTP API")], [])

    def test_every_status_of_an_error_is_in_the_reference(self):
        """Those of the error classes, and those given to an error as its second argument."""
        errors = [kind.__name__ for kind in linger.LingerError.__subclasses__()] + ["LingerError"]
        statuses = {getattr(linger, name).status for name in errors}
        for call in ast.walk(parse(SOURCE)):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in errors:
                statuses |= {a.value for a in call.args[1:2] if isinstance(a, ast.Constant)}
        rows = re.findall(r"^\| ([0-9, ]+) \|", self.section("HTTP API"), re.M)
        listed = {int(status) for row in rows for status in row.split(", ")}
        self.assertEqual({s for s in statuses if isinstance(s, int)} - listed, set())

    def test_every_option_of_the_server_is_in_its_table_with_its_default(self):
        table = self.section("Deployment")
        for option in linger.OPTIONS:
            name = f"--{option.name} {option.metavar}".rstrip()
            default = (
                ""
                if option.default in (None, "") or option.default is False
                else f"{option.default} "
            )
            self.assertIn(f"\n| `{name}` | {default}| ", table)

    def test_every_limit_is_in_the_section_of_limits_or_is_internal(self):
        section = self.section("Limits")
        names = {n for n in vars(linger) if n.startswith("MAX_")} - self.INTERNAL_LIMITS
        self.assertGreater(len(names), 25)
        names |= {"READ_TIMEOUT", "IDLE_TIMEOUT", "SEND_TIMEOUT", "SEND_CHUNK", "FORM_SLACK"}
        for name in names:
            self.assertRegex(section, rf"(?<![0-9,]){getattr(linger, name):,}(?!,?[0-9])", name)
        for option in linger.OPTIONS:
            if option.name.startswith("max-") or option.name == "read-timeout":
                self.assertIn(f"`--{option.name}", section)

    def test_every_command_is_in_a_session_and_every_option_told(self):
        section = self.section("Command line")
        sessions = "".join(re.findall(r"```console\n(.*?)```", section, re.S))
        words = set(re.split(r"[\s`,()]+", section))
        parameters = {f"--{p.name}" for p in linger.ALL_PARAMETERS}
        for command in linger.COMMANDS[1:]:
            self.assertTrue(re.search(rf"linger {command.name}\b", sessions), command.name)
            names = {name for names, _ in command.arguments for name in names if name[0] == "-"}
            self.assertEqual(names - words - parameters, set(), command.name)

    def test_every_method_of_the_client_is_in_a_session(self):
        sessions = "".join(re.findall(r"```py(?:thon|con)\n(.*?)```", self.readme, re.S))
        methods = [name for name in dir(linger.Client) if not name.startswith("_")]
        self.assertEqual([m for m in methods if f".{m}(" not in sessions], [])

    # -- examples

    def test_containers_run_the_server_and_see_its_health(self):
        section = self.section("Deployment").partition("### Docker\n")[2].partition("\n### ")[0]
        commands = re.findall(r"python3 /linger\.py (.*)", section)
        self.assertEqual(len(commands), 2)
        names = {f"--{option.name}" for option in linger.OPTIONS}
        for command in commands:
            self.assertEqual(set(re.findall("--[a-z-]+", command)) - names, set())
        (check,) = re.findall(r'python3 -c "(.*)"', section)
        with linger.serve() as server:
            code = check.replace("http://127.0.0.1:8989", server.url)
            statuses = [subprocess.call([sys.executable, "-c", code], stderr=subprocess.DEVNULL)]
        statuses.append(subprocess.call([sys.executable, "-c", code], stderr=subprocess.DEVNULL))
        self.assertEqual(statuses, [0, 1])

    @unittest.skipUnless(shutil.which("curl"), "needs curl")
    def test_every_line_for_a_shell_gives_what_it_shows(self):
        """Each block starts on an empty server; the tutorial is one session."""
        blocks = re.findall(r"```console\n(.*?)```", self.readme, re.S)
        tutorial = re.findall(r"```console\n(.*?)```", self.section("Tutorial"), re.S)
        sessions = [[block] for block in blocks if block not in tutorial]
        for number, session in enumerate([tutorial, *sessions]):
            with self.subTest(session=number), self.new_server() as server:
                for text in re.split(r"(?m)^\$ ", "".join(session))[1:]:
                    command, _, expected = text.partition("\n")
                    self.check(command, expected, server)

    @contextlib.contextmanager
    def new_server(self):
        """An empty server, and an empty current directory."""
        here = os.getcwd()
        os.chdir(tempfile.mkdtemp(dir=self.folder))
        try:
            with linger.serve() as server:
                yield server
        finally:
            os.chdir(here)

    def check(self, command, expected, server):
        command = command.replace("http://127.0.0.1:8989", server.url)
        words = list(shlex.shlex(command, posix=True, punctuation_chars=True))
        if words[0] == "linger" and not {"|", "||", ">", "<", "--"} & set(words):
            _, output, errors = run_command(server.url, *shlex.split(command)[1:])
            output = output.decode() + errors
        else:
            output = self.run_shell(command, server)
        pattern = re.escape(expected.rstrip("\n")).replace(re.escape("..."), ".*")
        self.assertRegex(output.rstrip("\n"), f"^(?s:{pattern})$", command)

    def run_shell(self, command, server):
        self.assertRegex(command, "curl |linger ")
        script = """curl() { command curl -s "$@"; }; linger() { "$PYTHON" -S "$LINGER" "$@"; }; """
        if "sleep 1" in command:  # which leaves another command the time to listen
            Path("listening").unlink(missing_ok=True)
            script += "sleep() { until [ -e listening ]; do command sleep 0.02; done; }; "
            live = server.broker._state.live
            self.thread(self.note_listener, live, {*live.channels, *live.topics})
        names = {"PYTHON": sys.executable, "LINGER": compiled}
        return subprocess.run(
            ["sh", "-c", script + command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE,
            env={**os.environ, **names, "LINGER_URL": server.url},
        ).stdout.replace("\r\n", "\n")  # fmt: skip

    def note_listener(self, live, before):
        until(lambda: {*live.channels, *live.topics} - before)
        Path("listening").touch()

    def test_every_python_session_gives_what_it_shows(self):
        """Each has an empty server."""
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
        sessions = re.findall(r"```pycon\n(.*?)```", self.readme, re.S)
        self.assertGreater(len(sessions), 4)
        for text in sessions:
            with self.new_server() as server:
                text = text.replace("http://127.0.0.1:8989", server.url)
                test = doctest.DocTestParser().get_doctest(text, {}, "README.md", None, None)
                output = io.StringIO()
                self.assertEqual(runner.run(test, out=output.write).failed, 0, output.getvalue())

    def test_the_worker_works_until_sigterm(self):
        self.hasten(DISCONNECT_CHECK_INTERVAL=0.02)
        script = next(s for s in self.python_blocks() if ".work(" in s)
        with linger.serve() as server, linger.Client(server.url) as client:
            client.post("images", "cat.jpg")
            worker = subprocess.Popen(
                [sys.executable, *STRICT, "-c", script], cwd=os.path.dirname(compiled), text=True,
                env={**os.environ, "LINGER_URL": server.url}, stdout=subprocess.PIPE,
            )  # fmt: skip
            self.addCleanup(worker.communicate)
            self.addCleanup(worker.kill)
            self.assertEqual(worker.stdout.readline(), "working on: cat.jpg\n")
            until(lambda: client.channel_stats("images") == {"ready": 0, "hidden": 0})
            worker.terminate()
            self.assertEqual(worker.wait(PATIENCE), 0)

    def test_the_fixture_gives_a_client_of_a_server_of_its_own(self):
        script = next(s for s in self.python_blocks() if "pytest" in s)
        pytest = types.SimpleNamespace(fixture=contextlib.contextmanager)
        names = {}
        with unittest.mock.patch.dict(sys.modules, pytest=pytest):
            exec(script, names)
        with names["queue"]() as queue:
            self.assertEqual(queue.post("q", "x").id, 1)

    def python_blocks(self):
        return re.findall(r"```python\n(.*?)```", self.readme, re.S)


if __name__ == "__main__":
    unittest.main()
