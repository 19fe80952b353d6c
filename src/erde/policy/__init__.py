"""The exit rule, operating points and their promises. May import: common."""
