"""Rules of the house, the build, the package as it is installed, and the yardstick itself."""
