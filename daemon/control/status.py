"""The status of the daemon, read from process table, boards and journals: plain dicts, ready for JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from daemon import __version__
from daemon.config import options
from daemon.control.event_history import EventHistory
from daemon.control.policy.dispatch import count_in_flight
from daemon.control.policy.freeness import InFlight, policy_of
from daemon.control.policy.projection import emptied, project
from daemon.enums import ConnectionEnd
from daemon.ipc import metrics_page
from daemon.ipc.child import ChildSpec
from daemon.ipc.desired_state import DesiredStateReader
from daemon.ipc.fabric import Fabric
from daemon.ipc.journal import JournalView, SlotState
from daemon.ipc.keys_page import KeysRequester
from daemon.ipc.messages import (
    EngineFacts,
    EngineState,
    FrontendFacts,
    decode_engine_facts,
    decode_frontend_facts,
    pool_state,
)
from daemon.ipc.process_table import ProcessFacts, ProcessState, engine_state


class StatusReader:
    """Reads the shared memory of all processes. It writes nothing."""

    def __init__(self, fabric: Fabric, spec: ChildSpec) -> None:
        topology = fabric.topology
        self._fabric = fabric
        self._spec = spec
        self._policy = policy_of(spec.config.policy, spec.config.headroom)
        self._topology = topology
        self._table = fabric.table()
        self._desired_states = DesiredStateReader(fabric.desired_states())
        self._shutdown = fabric.shutdown()
        self._engines = [fabric.board_of(topology.engine(i)) for i in range(topology.engines)]
        self._frontends = [fabric.board_of(topology.frontend(k)) for k in range(topology.frontends)]
        self._key_outcomes = KeysRequester(fabric.keys_page())
        self._journals = [JournalView(fabric.journal(k)) for k in range(topology.frontends)]

    def facts(self) -> list[EngineFacts | None]:
        """Return the latest facts of each engine; of a parked one, those of an empty engine; None if it is not up."""
        self._table.refresh()
        return [self._engine_facts(i) for i in range(self._topology.engines)]

    def projected(self, facts: Sequence[EngineFacts | None]) -> list[EngineFacts | None]:
        """Return `facts`, just read, as they will be once each engine has reached its desired state."""
        engines = range(self._topology.engines)
        loading = [facts[i] is None and self._row(i).state == ProcessState.UP for i in engines]
        predecessors = [self._last_published(i) if loading[i] else None for i in engines]
        return project(facts, predecessors, [self._desired_states.of(i) for i in engines])

    def event_history(self) -> EventHistory:
        """Return a new reader of the events of all processes."""
        return EventHistory(self._fabric)

    def find(self, name: str) -> list[dict[str, Any]]:
        """Return the unfinished requests called `name`: all choices of a response, or one by its own id.

        All choices have the id of the response, and the `x-request-id` that the client has sent.
        """

        def names(row: dict[str, Any]) -> tuple[str, ...]:
            return row["id"], row["id"].rsplit("-", 1)[0], f"{row['rid']:x}", row["x_request_id"]

        return [row for row in self.requests() if name and name in names(row)]

    def status(self) -> dict[str, Any]:
        """Return the state of the daemon, its engines and its frontends."""
        facts = self.facts()
        frontends = [self._frontend_facts(k) for k in range(self._topology.frontends)]
        in_flight = count_in_flight(facts, frontends)
        config = self._spec.config
        return {
            "version": __version__,
            "model": config.main_name or config.model,
            "address": f"http://{config.host}:{config.port}",
            "supervisor_pid": self._spec.supervisor_pid,
            "state": self._daemon_state(facts),
            "shutdown": self._shutdown_facts(),
            "engines": [self._engine(i, f, in_flight[i]) for i, f in enumerate(facts)],
            "frontends": [self._frontend(k, f) for k, f in enumerate(frontends)],
            "coordinator": self._process(0),
            "keys": self._keys(),
        }

    def _daemon_state(self, facts: Sequence[EngineFacts | None]) -> str:
        """Return "serving", "draining", or "not_serving": no engine or no frontend serves (yet)."""
        if self.shutting_down:
            return "draining"
        frontends = range(self._topology.frontends)
        answered = any(self._process(self._topology.frontend(k))["state"] == "serving" for k in frontends)
        served = any(f is not None and f.state == EngineState.SERVING for f in facts)
        return "serving" if answered and served else "not_serving"

    @property
    def shutting_down(self) -> bool:
        """True once the daemon has been told to end."""
        return self._shutdown.cut_off is not None

    def _shutdown_facts(self) -> dict[str, Any] | None:
        """Return how many requests still run and after how many seconds they are cut off; None while it serves."""
        cut_off = self._shutdown.cut_off
        if cut_off is None:
            return None
        running = sum(len(journal.live_slots()) for journal in self._journals)
        return {"requests": running, "seconds_left": max(0.0, cut_off - time.monotonic())}

    def requests(self) -> list[dict[str, Any]]:
        """Return a row for every unfinished request, oldest first."""
        found = []
        for k, journal in enumerate(self._journals):
            for slot in journal.live_slots():
                row = self._request(k, journal, slot)
                if row is not None:
                    found.append(row)
        return sorted(found, key=lambda row: -row["age_seconds"])

    def config(self) -> list[dict[str, Any]]:
        """Return every option with its value and the origin of the value."""
        config = self._spec.config
        return [
            {
                "name": option.name,
                "value": getattr(config, option.name),
                "origin": config.origin.get(option.name, "default"),
                "unit": option.metadata["unit"],
                "meaning": option.metadata["meaning"],
            }
            for option in options()
        ]

    def _engine(self, i: int, facts: EngineFacts | None, in_flight: InFlight) -> dict[str, Any]:
        process = self._process(self._topology.engine(i))
        row: dict[str, Any] = {"engine": i, "device": self._spec.config.devices[i], **process}
        row["desired"] = self._desired_states.of(i).name.lower()
        row["wished"] = row["desired"]  # deprecated
        process_state = self._row(i).state
        if facts is None or process_state != ProcessState.UP:
            return row
        freeness = self._policy.dispatch(facts, in_flight)
        page = metrics_page.snapshot(self._fabric.metrics(self._topology.engine(i)), metrics_page.ENGINE)
        return row | {
            "state": engine_state(process_state, EngineState(facts.state)),
            "running": facts.running,
            "waiting": facts.waiting,
            "kv_used_blocks": facts.used_blocks,
            "kv_total_blocks": facts.total_blocks,
            "kv_usage": facts.used_blocks / max(1, facts.total_blocks),
            "tokens_per_second": facts.tokens_per_second,
            "step_ms": facts.step_seconds * 1e3,
            "steps": facts.step,
            "knee": facts.knee or None,
            "ideal_tokens": facts.ideal_tokens or None,
            "freeness": freeness if math.isfinite(freeness) else None,
            "preemptions": int(page.counter("preemptions")),
            "incoming": facts.incoming,
            "outgoing": facts.outgoing,
            "migrated_bytes": int(page.counter("migrated_bytes")),
            "peer_pools": self._peer_pools(i, facts),
            "weights": f"{facts.weights:016x}",
            "fingerprint": f"{facts.fingerprint:016x}",
        }

    def _peer_pools(self, i: int, facts: EngineFacts) -> dict[str, str]:
        """Return whether engine i has the KV pool of each other engine open, by the engine's number."""
        others = (j for j in range(self._topology.engines) if j != i)
        return {str(j): pool_state(facts, j).name.lower() for j in others}

    def _frontend(self, k: int, facts: FrontendFacts | None) -> dict[str, Any]:
        process = self._topology.frontend(k)
        page = metrics_page.snapshot(self._fabric.metrics(process), metrics_page.FRONTEND)
        row = {"frontend": k, **self._process(process)} | {
            "connections": int(page.gauge("connections")),
            "max_connections": int(page.gauge("max_connections")),
            "connections_cut": {reason: int(page.counter("connections_cut", reason)) for reason in ConnectionEnd},
        }
        if facts is None:
            return row
        # The board is written at dispatch only, so its own count still includes requests that have ended since.
        return row | {"active": len(self._journals[k].live_slots()), "ready": facts.ready}

    def _keys(self) -> dict[str, Any] | None:
        """Return how many API keys are accepted, and why the last reload failed; None if clients need no key."""
        outcome = self._key_outcomes.outcome()
        if outcome is None:
            return None
        return {"accepted": outcome.keys, "tenants": outcome.tenants, "error": outcome.error}

    def _process(self, process: int) -> dict[str, Any]:
        row: ProcessFacts = self._table.rows[process]
        progress = self._fabric.progress(process)
        now = time.monotonic()
        return {
            "state": engine_state(row.state, progress.state),
            "pid": row.pid if row.state == ProcessState.UP else None,
            "incarnation": row.incarnation,
            "uptime_seconds": now - row.started_at if row.state == ProcessState.UP else 0.0,
            "overdue_seconds": max(0.0, progress.overdue(now)) if row.state == ProcessState.UP else 0.0,
            "restarts": row.restarts,
            "last_exit": row.last_exit,
        }

    def _request(self, k: int, journal: JournalView, slot: int) -> dict[str, Any] | None:
        rid, output = journal.rid(slot), journal.num_output(slot)
        engine, _ = journal.owner(slot)
        prompt_len, priority = journal.prompt_len(slot), journal.priority(slot)
        try:
            params = journal.params(slot)
        except ValueError:
            return None  # the slot was overwritten during the read
        if journal.rid(slot) != rid or journal.state(slot) is not SlotState.LIVE:
            return None  # the request ended during the read
        return {
            "id": params.label or f"{rid:x}",
            "x_request_id": params.x_request_id,
            "rid": rid,
            "frontend": k,
            "engine": engine,
            "epoch": journal.epoch(slot),
            "phase": "decode" if output else "queued or prefill",
            "prompt_tokens": prompt_len,
            "output_tokens": output,
            "max_tokens": params.sampling.max_tokens,
            "priority": priority,
            "age_seconds": time.monotonic() - params.arrival,
        }

    def _engine_facts(self, i: int) -> EngineFacts | None:
        last, row = self._last_published(i), self._row(i)
        if last is None:
            return None
        if row.state == ProcessState.PARKED:
            return emptied(last, EngineState.PARKED)
        return last if row.state == ProcessState.UP and last.incarnation == row.incarnation else None

    def _last_published(self, i: int) -> EngineFacts | None:
        """Return the facts that engine i published last, in this incarnation or an earlier one."""
        found = self._engines[i].read()
        return decode_engine_facts(found[1]) if found is not None else None

    def _row(self, i: int) -> ProcessFacts:
        return self._table.rows[self._topology.engine(i)]

    def _frontend_facts(self, k: int) -> FrontendFacts | None:
        found = self._frontends[k].read()
        return decode_frontend_facts(found[1]) if found is not None else None
