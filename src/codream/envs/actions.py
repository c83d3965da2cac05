"""What the actions of known games are called, and which of them does nothing."""

from __future__ import annotations

from codream.envs import EnvSpec

__all__ = ["action_names", "idle_action"]

# By how an environment's name begins; only where all of its agents have so many actions.
_NAMES = {
    "butterfly:cooperative_pong": ("stay", "up", "down"),
    "butterfly:knights_archers_zombies": (
        "forward",
        "backward",
        "turn counterclockwise",
        "turn clockwise",
        "attack",
        "stay",
    ),
    "butterfly:pistonball": ("down", "stay", "up"),
    "jaxmarl:MPE_": ("stay", "left", "right", "down", "up"),
    "jaxmarl:coin_game": ("right", "left", "down", "up", "stay"),
    "jaxmarl:overcooked_v2": ("right", "down", "left", "up", "stay", "interact"),
    "jaxmarl:overcooked": ("up", "down", "right", "left", "stay", "interact"),
    "jaxmarl:storm": ("turn left", "turn right", "forward", "interact", "stay"),
    "jaxmarl:storm_np": (
        "turn left",
        "turn right",
        "forward",
        "stay",
        "zap forward",
        "zap ahead",
        "zap right",
        "zap left",
    ),
    "mpe2:": ("stay", "left", "right", "down", "up"),
}
# Of games whose actions have no names here.
_IDLE = {"jaxmarl:HeuristicEnemySMAX": 4, "jaxmarl:SMAX": 4, "jaxmarl:jaxnav": 2, "jaxmarl:smax": 4}


def action_names(spec: EnvSpec) -> list[str]:
    """What the actions are called, where that is known; elsewhere numbers."""
    for game, names in _NAMES.items():
        if spec.name.startswith(game) and set(spec.num_actions) == {len(names)}:
            return list(names)
    return [str(a) for a in range(spec.max_actions)]


def idle_action(spec: EnvSpec) -> int:
    """The action that does nothing, where that is known; elsewhere the first."""
    names = action_names(spec)
    if "stay" in names:
        return names.index("stay")
    return next((action for game, action in _IDLE.items() if spec.name.startswith(game)), 0)
