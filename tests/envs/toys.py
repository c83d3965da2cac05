"""Tiny PettingZoo environments, each with one property that an adapter can get wrong."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv


class Toy(ParallelEnv):
    """Two agents, vectors of two, three actions; ends by time limit after `length` steps.

    Observations are [step of the episode, a number drawn at reset]; the reward is the action plus one.
    """

    metadata: ClassVar[dict[str, Any]] = {"name": "toy_v0"}
    length = 5

    def __init__(self) -> None:
        self.possible_agents = ["red_0", "blue_0"]
        self.steps = 0
        self.luck = 0.0

    def observation_space(self, agent: str) -> spaces.Space:
        return spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Discrete(3)

    def observe(self, agent: str) -> Any:
        return np.asarray([self.steps, self.luck])

    def info(self, agent: str) -> dict[str, Any]:
        return {}

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.luck = float(np.random.default_rng(seed).random())
        self.steps = 0
        self.agents = self.possible_agents[:]
        return {a: self.observe(a) for a in self.agents}, {a: self.info(a) for a in self.agents}

    def terminated(self, agent: str) -> bool:
        return False

    def truncated(self, agent: str) -> bool:
        return self.steps >= self.length

    def step(self, actions: dict[str, Any]) -> Any:
        for agent, action in actions.items():
            assert self.action_space(agent).contains(action), f"{agent} got the action {action!r}"
        self.steps += 1
        before = self.agents[:]
        ends = {a: self.terminated(a) for a in before}
        cuts = {a: self.truncated(a) for a in before}
        self.agents = [a for a in before if not ends[a] and not cuts[a]]
        obs = {a: self.observe(a) for a in before}
        return obs, {a: float(actions[a]) + 1 for a in before}, ends, cuts, {a: self.info(a) for a in before}


class IntegerToy(Toy):
    """Integer observations and actions that start at 3 and 1; ends in a true terminal."""

    def observation_space(self, agent: str) -> spaces.Space:
        return spaces.Discrete(8, start=3)

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Discrete(2, start=1) if agent == "red_0" else spaces.Discrete(4, start=-1)

    def observe(self, agent: str) -> Any:
        return np.int64(3 + self.steps)

    def terminated(self, agent: str) -> bool:
        return self.steps >= self.length

    def truncated(self, agent: str) -> bool:
        return False


class MaskToy(Toy):
    """Dict observations with a mask: only the action `step mod 3`, and nothing at all at step 3."""

    def observation_space(self, agent: str) -> spaces.Space:
        return spaces.Dict(
            observation=spaces.Box(-1, 99, (2,), np.float32), action_mask=spaces.Box(0, 1, (3,), np.int8)
        )

    def observe(self, agent: str) -> Any:
        mask = np.arange(3) == self.steps % 3 if self.steps != 3 else np.zeros(3)
        return {
            "observation": np.asarray([self.steps, self.luck], np.float32),
            "action_mask": mask.astype(np.int8),
        }


class InfoMaskToy(Toy):
    """The mask lies in `infos`: never the last action."""

    def info(self, agent: str) -> dict[str, Any]:
        return {"action_mask": np.asarray([1, 1, 0])}


class EarlyToy(Toy):
    """Agents come and go.

    `hare_0` terminates after 2 steps, `hare_1` is truncated after 3 (and its last observation is missing),
    `late_0` joins after step 2, `tortoise_0` stays to the time limit.
    """

    length = 6

    def __init__(self) -> None:
        super().__init__()
        self.possible_agents = ["hare_0", "hare_1", "late_0", "tortoise_0"]

    def terminated(self, agent: str) -> bool:
        return agent == "hare_0" and self.steps == 2

    def truncated(self, agent: str) -> bool:
        return self.steps >= self.length or (agent == "hare_1" and self.steps == 3)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        obs, infos = super().reset(seed, options)
        self.agents.remove("late_0")
        return {a: obs[a] for a in self.agents}, {a: infos[a] for a in self.agents}

    def step(self, actions: dict[str, Any]) -> Any:
        obs, *rest = super().step(actions)
        if self.steps == 3:
            del obs["hare_1"]
        if self.steps == 2:
            self.agents.append("late_0")
            obs["late_0"] = self.observe("late_0")
        return obs, *rest


class KeepsFinishedToy(EarlyToy):
    """Never takes anybody off `env.agents`, and wants everybody's action at every step."""

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        obs, infos = Toy.reset(self, seed, options)
        return obs, infos

    def step(self, actions: dict[str, Any]) -> Any:
        answer = Toy.step(self, actions)
        self.agents = self.possible_agents[:]
        return answer


class UnequalToy(Toy):
    """Observations and actions of different sizes and kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.possible_agents = ["matrix", "tuple", "bits"]

    def observation_space(self, agent: str) -> spaces.Space:
        if agent == "matrix":
            return spaces.Box(0, 1, (2, 4), np.float64)
        if agent == "tuple":
            return spaces.Tuple((spaces.Discrete(3), spaces.Box(0, 9, (2,), np.int64)))
        return spaces.MultiDiscrete([2, 3])

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Discrete({"matrix": 2, "tuple": 5, "bits": 3}[agent])

    def observe(self, agent: str) -> Any:
        if agent == "matrix":
            return np.full((2, 4), self.luck)
        if agent == "tuple":
            return (self.steps % 3, np.asarray([self.steps, 9]))
        return np.asarray([self.steps % 2, self.steps % 3])


class ImageToy(Toy):
    """A bytes image with channels last for one agent, one of floats with channels first for the other."""

    def observation_space(self, agent: str) -> spaces.Space:
        if agent == "red_0":
            return spaces.Box(0, 255, (20, 128, 3), np.uint8)
        return spaces.Box(0, 1, (3, 64, 64), np.float32)

    def observe(self, agent: str) -> Any:
        if agent == "red_0":
            image = np.zeros((20, 128, 3), np.uint8)
            image[:, :2, 1] = 10 * self.steps  # the first of 64 columns after resizing
            return image
        image = np.zeros((3, 64, 64), np.float32)
        image[2, 0, 1] = 0.5
        return image


class FaultyToy(Toy):
    """Does one thing wrong at step 2, by name."""

    def __init__(self, fault: str = "step") -> None:
        super().__init__()
        self.fault = fault

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if self.fault == "reset" and seed == 7:
            raise RuntimeError("the level does not load")
        answer = super().reset(seed, options)
        return answer[0] if self.fault == "no infos" else answer

    def step(self, actions: dict[str, Any]) -> Any:
        obs, rewards, ends, cuts, infos = super().step(actions)
        if self.steps == 2:
            if self.fault == "step":
                raise ZeroDivisionError("the engine stalled")
            if self.fault == "shape":
                obs["blue_0"] = np.zeros(7)
            if self.fault == "nan":
                obs["blue_0"] = np.asarray([0.0, np.nan])
            if self.fault == "nan reward":
                rewards["red_0"] = np.nan
            if self.fault == "text reward":
                rewards["red_0"] = "much"
            if self.fault == "no reward":
                del rewards["red_0"]
            if self.fault == "no observation":
                del obs["red_0"]
            if self.fault == "mask":
                infos["red_0"] = {"action_mask": np.ones(4)}
            if self.fault == "stranger":
                self.agents.append("green_0")
            if self.fault == "four":
                return obs, rewards, ends, infos
        return obs, rewards, ends, cuts, infos


class AbroadToy(Toy):
    """Knows the process that it should be in, `home`, and does something else in any other, by name."""

    def __init__(self, home: int, away: str = "") -> None:
        super().__init__()
        self.away = away if os.getpid() != home else ""
        if self.away == "not made":
            raise OSError("no licence")

    def observe(self, agent: str) -> Any:
        """What the process has imported."""
        return np.asarray(["jax" in sys.modules, "codream" in sys.modules], float)

    def step(self, actions: dict[str, Any]) -> Any:
        if self.away == "hangs":
            time.sleep(60)
        if self.away == "odd":
            raise Odd(1, 2)
        if self.away == "talks":
            print("printed")
            os.write(1, b"from C\n")
            assert sys.stdin.read() == ""
        return super().step(actions)


class Odd(Exception):
    """Cannot be unpickled: what it is made from is not what it keeps."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} is not {right}")
