"""The launchers: `llamax launch STUDY --on NAME` is `NAME.py` here, a module with the names of `protocol.Launcher`."""
