"""What people read: tables, figures, performance goals and the page, all from rows alone."""
