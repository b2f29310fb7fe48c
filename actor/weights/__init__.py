"""The weight agent: fetches each publication from the learner and installs it in one inference server."""
