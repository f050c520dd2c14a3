"""Dashboards, rules and provisioning of moe-monitor as code. ``grafana/src/build.py`` writes them."""
